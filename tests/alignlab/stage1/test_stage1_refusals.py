"""What is wrong with a Stage 1 recipe, its data or the command is said in one line."""

import shutil
from pathlib import Path

import pytest

from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.experiments.data_preview import load_data
from alignlab.recipe import dump, load_stage1_run
from command_line import alignlab, refused
from damage import flip

KINDS = ["sara", "moalign"]
Recipes = dict[str, Path]


@pytest.mark.parametrize(
    ("kind", "override", "expected"),
    [
        ("sara", "stage1.hiden=3", "stage1.hiden: unknown key 'hiden', did you mean 'hidden'?"),
        ("sara", "stage1.width=3", "stage1.width: unknown key 'width'"),
        ("moalign", "setps=3", "setps: unknown key 'setps', did you mean 'steps'?"),
        ("moalign", "optim.ema=0.9", "optim.ema: unknown key 'ema'"),
        ("moalign", "stage1.flow=raft", "stage1.flow: unknown value 'raft'"),
        ("moalign", "stage1.kind=sarra", "stage1: unknown value 'sarra', did you mean 'sara'?"),
        ("moalign", "model={path: x, precision: bf16}", "model.precision: nothing reads it with"),
        ("moalign", "model.path=x", "model.path: x: no such folder, shipped asset or hub id"),
        ("sara", "model=null", "model: missing"),
        ("sara", "stage1.val_clips=9", "stage1.val_clips: 9 is more than data.val_clips, 4"),
        ("sara", "stage1.heads=5", "stage1.heads: 5 does not divide the teacher's width, 24"),
        ("sara", "model.path=assets/tiny-dino", "model.path: assets/tiny-dino has no model_index"),
        ("moalign", "data.frames=1", "data.frames: 1 frames give the teacher 1 time step"),
        ("sara", "teachers.dino.family=vjepa2", "teachers.dino: a video teacher needs"),
        ("moalign", "name=../x", "name: '../x' must be a folder inside `output`"),
        ("moalign", "teachers.b.family=tiny-dino", "teachers: Stage 1 reads one teacher, got 2"),
    ],
)
def test_one_line_for_a_mistake(
    recipes: Recipes, kind: str, override: str, expected: str, tmp_path: Path
) -> None:
    assert expected in refused("stage1", kind, recipes[kind], f"output={tmp_path}", override)


def test_the_wrong_command_names_the_right_one(recipes: Recipes, recipe_file: Path) -> None:
    sara = recipes["sara"]
    assert f"use `alignlab stage1 sara {sara}`" in refused("train", sara)
    assert f"use `alignlab stage1 sara {sara}`" in refused("stage1", "moalign", sara)
    assert f"use `alignlab train {recipe_file}`" in refused("stage1", "sara", recipe_file)
    assert "use `alignlab compare demo`" in refused("stage1", "sara", "demo")
    result = alignlab("stage1", "sarra", sara)
    assert result.exit_code == 2 and "valid: sara, moalign" in result.stderr


@pytest.mark.parametrize("file", ["model.safetensors", "stage1.json", "checksums.json"])
def test_a_damaged_network_is_refused_by_stage_1_and_by_stage_2(
    recipes: Recipes, networks: Recipes, recipe_file: Path, tmp_path: Path, file: str
) -> None:
    shutil.copytree(networks["moalign"].parent, tmp_path / "moalign")
    network = tmp_path / "moalign" / "stage1"
    flip(network / file)
    into = f"output={tmp_path}"
    row = f"{{name: moalign, teacher: dino, blocks: [1], head: {network}}}"
    line = refused("train", recipe_file, into, f"objectives={{mo: {row}}}")
    assert line.startswith("error: objectives.mo.head: ") and f"{file} is damaged" in line
    line = refused("stage1", "moalign", recipes["moalign"], into, "name=moalign")
    assert f"{file} is damaged" in line and "result.json" in line


def test_a_folder_of_another_recipe_is_not_overwritten(
    recipes: Recipes, networks: Recipes, recipe_file: Path
) -> None:
    into = [f"output={networks['sara'].parents[1]}", "name=sara"]
    for command in (
        ["stage1", "sara", str(recipes["sara"]), "optim.lr=0.5"],
        ["stage1", "moalign", str(recipes["moalign"])],
        ["train", str(recipe_file)],
    ):
        assert "holds a run of another recipe" in refused(*command, *into)
    assert "use `alignlab stage1 sara" in refused("export", networks["sara"].parent)


def test_print_config_and_data_of_a_recipe(recipes: Recipes) -> None:
    for kind in KINDS:
        config = load_stage1_run(kind, recipes[kind])
        shown = alignlab("stage1", kind, recipes[kind], "--print-config")
        assert shown.stdout == dump(config)
        assert load_data(recipes[kind]) == (config.data, Path(config.output))


@pytest.mark.parametrize("split", ["train", "val"])
def test_clips_without_masks_are_refused(
    recipes: Recipes, tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(dataset: ShapesDataset) -> str | None:
        return "seven.mp4" if dataset.split == split else None

    monkeypatch.setattr(ShapesDataset, "without_masks", lacking)
    message = refused("stage1", "sara", recipes["sara"], f"output={tmp_path}")
    assert "seven.mp4: has no entity masks, which SARA's Stage 1 learns from" in message
    assert not list(tmp_path.rglob("metrics.jsonl"))
    unread = ("stage1", "moalign", recipes["moalign"], f"output={tmp_path}", "name=b", "steps=1")
    assert alignlab(*unread).exit_code == 0
