"""`alignlab stage1`: it trains, resumes bitwise, refuses in one line, and Stage 2 fits it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from transformers import VJEPA2Config, VJEPA2Model
from typer.testing import CliRunner, Result

from alignlab.cli import app
from alignlab.config import RunConfig
from alignlab.data.shapes import ShapesDataset
from alignlab.errors import UserError
from alignlab.losses.stage1_folder import load_stage1
from alignlab.randomness import generator
from alignlab.recipe import dump, load_data, load_stage1_run
from alignlab.run import build_run
from alignlab.stage1.check import check_stage1
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.moalign import MoAlignTask
from alignlab.stage1.sara import SaraTask
from alignlab.stage1.train import build_stage1, step_clips, train_stage1
from alignlab.tracking import read_rows
from alignlab.train import train

DRIVER = Path(__file__).with_name("killed_stage1.py")
KINDS = ["sara", "moalign"]
MOMENTS = [
    "between checkpoints",
    "right after a checkpoint",
    "while the result is written",
]

RECIPE = """
name: first
steps: 3
data: {{name: shapes, frames: 5, size: [48, 48], references: [2, 3], train_clips: 6, val_clips: 4}}
teachers:
  dino: {{family: dinov2, path: {teacher}, feature: post_norm}}
optim: {{lr: 1e-3, batch_size: 2, warmup: 2, schedule: cosine}}
checkpoint: {{every: 3, keep: 2}}
tracking: {{mlflow: none, log_every: 1}}
"""
SARA = """
model: {{path: {wan}}}
stage1: {{kind: sara, heads: 3, hidden: 8, embed_dim: 8, val_clips: 3}}
"""
MOALIGN = "stage1: {kind: moalign, width: 8, hidden: 8, decoder: 8, val_clips: 3}\n"

Recipes = dict[str, Path]


@pytest.fixture(scope="session")
def recipes(
    wan_folder: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recipes:
    """A recipe of three steps for each kind."""
    folder = tmp_path_factory.mktemp("stage1-recipes")
    texts = {"sara": SARA.format(wan=wan_folder), "moalign": MOALIGN}
    for kind, text in texts.items():
        (folder / f"{kind}.yaml").write_text(RECIPE.format(teacher=teacher_folder) + text)
    return {kind: folder / f"{kind}.yaml" for kind in KINDS}


@pytest.fixture(scope="session")
def networks(recipes: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    """A finished Stage 1 folder of each kind; not to be changed."""
    output = tmp_path_factory.mktemp("stage1")
    return {
        kind: train_stage1(
            load_stage1_run(kind, recipe, [f"output={output}", f"name={kind}"])  # type: ignore[arg-type]
        )
        for kind, recipe in recipes.items()
    }


def config_of(recipes: Recipes, kind: Any, *overrides: str) -> Stage1Config:
    return load_stage1_run(kind, recipes[kind], list(overrides))


def alignlab(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def refused(*arguments: str | Path) -> str:
    result = alignlab(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_trains_and_returns_a_finished_run_as_it_is(
    recipes: Recipes, kind: Any, tmp_path: Path
) -> None:
    arguments = ("stage1", kind, recipes[kind], f"output={tmp_path}")
    result = alignlab(*arguments)
    run = tmp_path / "first"
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout == f"stage 1 folder: {run / 'stage1'}\n"
    assert sorted(p.name for p in run.iterdir()) == [
        *("checkpoints", "environment.json", "metrics.jsonl", "recipe.yaml", "result.json"),
        "stage1",
    ]
    written = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert alignlab(*arguments).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == written


def test_mlflow_has_the_run(recipes: Recipes, tmp_path: Path) -> None:
    into = [f"output={tmp_path}", "tracking.mlflow=sqlite", "steps=1"]
    folder = train_stage1(config_of(recipes, "moalign", *into))
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run((folder.parent / "mlflow_run_id").read_text())
    assert run.info.status == "FINISHED" and run.data.params["stage1.kind"] == "moalign"
    assert run.data.metrics["val/flow_l1"] >= 0


def test_what_is_logged_and_measured(networks: Recipes) -> None:
    logged = {
        "sara": {"loss/total", "loss/bce", "loss/info_nce"},
        "moalign": {"loss/total"},
    }
    ious = {f"val/iou{of}" for of in ("", "_union", "_foreground", "_background", "_caption")}
    flows = {f"val/flow_l1{of}" for of in ("", "_zero", "_mean", "_clip_mean")}
    measured = {"sara": ious | {"val/bce"}, "moalign": flows}
    for kind, folder in networks.items():
        rows = read_rows(folder.parent / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 3]
        assert all(
            logged[kind] | {"grad/norm", "lr", "time/step"} <= row.keys() for row in rows[:3]
        )
        result = json.loads((folder.parent / "result.json").read_text())
        assert measured[kind] <= result["metrics"].keys() and result["steps"] == 3
        assert measured[kind] <= rows[3].keys()
        for key in measured[kind] - {"val/bce"}:
            assert 0 <= result["metrics"][key] <= 1, key
    rates = [row["lr"] for row in read_rows(networks["sara"].parent / "metrics.jsonl")[:3]]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])


def test_the_folder_says_what_it_was_trained_on(
    networks: Recipes, wan_folder: Path, teacher_folder: Path
) -> None:
    aligner, sara = load_stage1(networks["sara"], "sara")
    head, moalign = load_stage1(networks["moalign"], "moalign")
    for info in (sara, moalign):
        assert (info.teacher.family, info.teacher.feature) == ("dinov2", "post_norm")
        assert info.teacher.path == str(teacher_folder)
        assert (info.teacher_dim, info.grid) == (24, (3, 3))
    assert (sara.text, moalign.text) == (str(wan_folder), None)
    assert aligner.saliency(torch.ones(2, 5, 9, 24), torch.ones(2, 4, 32)).shape == (2, 5, 9)
    assert head.motion(torch.ones(2, 5, 9, 24), (5, 3, 3)).shape == (2, 5, 9, 8)


def test_training_lowers_the_losses(recipes: Recipes, tmp_path: Path) -> None:
    for kind, loss in (("sara", "loss/bce"), ("moalign", "loss/total")):
        longer = ["steps=30", "optim.lr=1e-2", "optim.schedule=constant", f"output={tmp_path}"]
        folder = train_stage1(config_of(recipes, kind, *longer, f"name={kind}"))
        losses = [row[loss] for row in read_rows(folder.parent / "metrics.jsonl")[:-1]]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), kind


@pytest.fixture(scope="module")
def resumed(recipes: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `killed_stage1.py` leaves."""
    folder = tmp_path_factory.mktemp("resume")
    for kind, recipe in recipes.items():
        text = recipe.read_text().replace("steps: 3", "steps: 7")
        (folder / f"{kind}.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, DRIVER, folder, *recipes], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def timeless(values: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in values.items() if not k.startswith(("time", "memory"))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_ends_as_the_uninterrupted_one(resumed: Path, kind: str) -> None:
    outputs = resumed / kind
    left = {
        moment: sorted(p.name for p in (outputs / f"{moment}-killed").glob("first/checkpoints/*"))
        for moment in MOMENTS
    }
    assert left == {
        "between checkpoints": ["step-000003"],
        "right after a checkpoint": ["step-000003", "step-000006"],
        "while the result is written": ["step-000006", "step-000007"],
    }
    assert not list(outputs.glob("*-killed/first/result.json"))
    assert not list(outputs.glob("*-killed/first/stage1"))
    assert list(outputs.glob("*-killed/first/.stage1.tmp"))
    expected = files(outputs / "uninterrupted")
    assert {"stage1/model.safetensors", "checkpoints/step-000007/state.json"} <= expected.keys()
    timed = {"recipe.yaml", "environment.json", "metrics.jsonl", "result.json"}
    for moment in MOMENTS:
        found = files(outputs / moment)
        assert found.keys() == expected.keys()
        assert [n for n in found.keys() - timed if found[n] != expected[n]] == []
        rows, other = (
            [timeless(row) for row in read_rows(outputs / name / "first" / "metrics.jsonl")]
            for name in ("uninterrupted", moment)
        )
        assert rows == other and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 7]


def files(output: Path) -> dict[str, bytes]:
    run = output / "first"
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_cache_changes_no_number(recipes: Recipes) -> None:
    for kind in KINDS:
        runs = [
            build_stage1(config_of(recipes, kind, f"data.cache_clips={size}")) for size in (0, 9)
        ]
        for run in runs:
            run.clips[2], run.clips[1]
        (plain, cached) = (run.task.loss([run.clips[1], run.clips[2]])[0] for run in runs)
        assert torch.equal(plain, cached)
        assert runs[1].clips[2] is runs[1].clips[2] and runs[0].clips[2] is not runs[0].clips[2]


def test_the_clips_of_a_step_depend_on_seed_and_step_alone(recipes: Recipes) -> None:
    run = build_stage1(config_of(recipes, "sara", "seed=3", "optim.batch_size=5"))
    dataset = ShapesDataset(run.config.data, "train")  # type: ignore[arg-type]
    for step in (0, 1, 7):
        run.state.step = step
        drawn = [
            int(torch.randint(len(dataset), (), generator=generator(3, "clip", step, i)))
            for i in range(5)
        ]
        assert [clip.key for clip in step_clips(run)] == [dataset[i].key for i in drawn]


def test_sara_asks_for_entities_all_and_background(recipes: Recipes) -> None:
    run = build_stage1(config_of(recipes, "sara"))
    sample = ShapesDataset(run.config.data, "train")[0]  # type: ignore[arg-type]
    clip = run.clips[0]
    assert clip.texts == (*sample.entities, ", ".join(sample.entities), "background")
    assert clip.entities == len(sample.entities) and clip.features_TPD.shape == (5, 9, 24)
    assert clip.targets_KTP.unique().tolist() == [0, 1]
    masks = sample.masks_ETHW
    assert masks is not None
    for row, mask in zip(clip.targets_KTP, [*masks, masks.any(0), ~masks.any(0)], strict=True):
        cells = mask.float().view(5, 3, 16, 3, 16).mean((2, 4)).flatten(1)
        assert torch.equal(row, (cells > 0.5).float())
    plain = build_stage1(config_of(recipes, "sara", "stage1.background=null")).clips[0]
    assert plain.texts == clip.texts[:-1] and len(plain.targets_KTP) == len(plain.texts)


def test_infonce_leaves_out_repeated_texts_and_follows_its_weight(recipes: Recipes) -> None:
    task = build_stage1(config_of(recipes, "sara", "stage1.nce_weight=0.5")).task
    assert isinstance(task, SaraTask)
    run = build_stage1(config_of(recipes, "sara"))
    one, two = run.clips[0], run.clips[1]
    total, terms = task.loss([one, two])
    torch.testing.assert_close(total, terms["loss/bce"] + 0.5 * terms["loss/info_nce"])
    same = replace(one, texts=("a", "a", *one.texts[2:]))
    assert task.loss([same])[1]["loss/info_nce"] < task.loss([one])[1]["loss/info_nce"]
    alone = replace(one, texts=("a",) * len(one.texts))
    assert task.loss([alone])[1]["loss/info_nce"].item() == pytest.approx(0, abs=1e-5)


def test_flow_of_the_data_set_or_of_opencv(recipes: Recipes) -> None:
    clips = {}
    for source in ("auto", "dis"):
        run = build_stage1(config_of(recipes, "moalign", f"stage1.flow={source}"))
        clips[source] = run.clips[0].flow_TPC
        assert clips[source].shape == (4, 9, 2)
    assert not torch.equal(clips["auto"], clips["dis"])
    task = run.task
    assert isinstance(task, MoAlignTask)
    sample = ShapesDataset(run.config.data, "train")[0]  # type: ignore[arg-type]
    exact_run = build_stage1(config_of(recipes, "moalign"))
    unknown = exact_run.task.encode(replace(sample, flow_THWC=None))
    torch.testing.assert_close(unknown.flow_TPC, clips["dis"])


def test_the_recipe_grid_is_what_the_teacher_is_asked_for(recipes: Recipes) -> None:
    for kind in KINDS:
        run = build_stage1(config_of(recipes, kind, "teachers.dino.grid=[4,6]"))
        assert run.clips[0].features_TPD.shape == (5, 24, 24)
        assert run.task.info().grid == (4, 6)


def test_a_video_teacher_gives_a_time_step_per_tubelet(recipes: Recipes, tmp_path: Path) -> None:
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    predictor = {f"pred_{key}": value for key, value in shape.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        VJEPA2Model(VJEPA2Config(**shape, **predictor, crop_size=48)).save_pretrained(tmp_path)
    teacher = f"teachers.dino={{family: vjepa2, path: {tmp_path}, feature: post_norm}}"
    shapes = {"sara": ("targets_KTP", (4, 9)), "moalign": ("flow_TPC", (3, 9, 2))}
    for kind, (name, expected) in shapes.items():
        run = build_stage1(config_of(recipes, kind, teacher, "data.frames=9"))
        clip = run.clips[0]
        assert clip.features_TPD.shape == (4, 9, 24)
        assert getattr(clip, name).shape[-len(expected) :] == expected
        assert run.task.loss([clip])[0].isfinite()


@pytest.mark.parametrize(
    ("kind", "override", "expected"),
    [
        ("sara", "stage1.hiden=3", "stage1.hiden: unknown key 'hiden', did you mean 'hidden'?"),
        ("sara", "stage1.width=3", "stage1.width: unknown key 'width'"),
        ("moalign", "setps=3", "setps: unknown key 'setps', did you mean 'steps'?"),
        ("moalign", "optim.ema=0.9", "optim.ema: unknown key 'ema'"),
        ("moalign", "stage1.flow=raft", "stage1.flow: unknown value 'raft'"),
        ("moalign", "stage1.kind=sarra", "stage1: unknown value 'sarra', did you mean 'sara'?"),
        ("moalign", "model.path=x", "model: nothing reads it with stage1.kind: moalign"),
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
    assert result.exit_code == 2 and "'sara', 'moalign'" in result.stderr


def test_a_folder_of_another_recipe_is_not_overwritten(
    recipes: Recipes, networks: Recipes, recipe_file: Path
) -> None:
    into = [f"output={networks['sara'].parents[1]}", "name=sara"]
    for command in (
        ["stage1", "sara", str(recipes["sara"]), "steps=4"],
        ["stage1", "moalign", str(recipes["moalign"])],
        ["train", str(recipe_file)],
    ):
        assert "holds a run of another recipe" in refused(*command, *into)
    assert "use `alignlab stage1 sara" in refused("export", networks["sara"].parent)


def test_print_config_and_data_of_a_recipe(recipes: Recipes) -> None:
    for kind in KINDS:
        config = config_of(recipes, kind)
        shown = alignlab("stage1", kind, recipes[kind], "--print-config")
        assert shown.stdout == dump(config)
        assert load_data(recipes[kind]) == config.data


def test_clips_without_masks_are_refused(recipes: Recipes) -> None:
    run = build_stage1(config_of(recipes, "sara"))
    sample = ShapesDataset(run.config.data, "train")[0]  # type: ignore[arg-type]
    for lacking in (replace(sample, masks_ETHW=None), replace(sample, entities=())):
        with pytest.raises(UserError, match="has no entity masks"):
            run.task.encode(lacking)


MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def stage2(make_config: MakeConfig, networks: Recipes) -> MakeConfig:
    """`stage2("x=y", ...)` is a run with both objectives on the trained networks."""
    named = {"sara": "aligner", "moalign": "head"}
    objectives = [
        f"objectives.{kind}={{name: {kind}, teacher: dino, blocks: [1], projector_dim: 8, "
        f"{setting}: {networks[kind]}}}"
        for kind, setting in named.items()
    ]
    return lambda *overrides: make_config(*objectives, *overrides)


def test_stage_2_trains_on_the_folders_of_stage_1(stage2: MakeConfig) -> None:
    folder = train(stage2())
    row = read_rows(folder / "metrics.jsonl")[1]
    assert row["loss/sara"] > 0 and row["loss/moalign"] > 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["teachers.dino.feature=pre_norm"], "teacher feature post_norm there, pre_norm here"),
        (["data.size=[48,64]"], "grid 3x3 there, 3x4 here"),
        (["teachers.dino.grid=[6,6]"], "grid 3x3 there, 6x6 here"),
        (["teachers.dino.family=tiny-dino"], "teacher family dinov2 there, tiny-dino here"),
        (["teachers.dino.path={copy}"], "teacher path {teacher} there, {copy} here"),
        (
            ["teachers.dino.feature=layer:0", "data.size=[32,48]"],
            "teacher feature post_norm there, layer:0 here; grid 3x3 there, 2x3 here",
        ),
    ],
)
@pytest.mark.parametrize(("kind", "key"), [("sara", "sara.aligner"), ("moalign", "moalign.head")])
def test_stage_2_on_other_tokens_is_refused(
    stage2: MakeConfig,
    networks: Recipes,
    teacher_folder: Path,
    tmp_path: Path,
    kind: str,
    key: str,
    overrides: list[str],
    expected: str,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(teacher_folder, copy)
    config = stage2(*(o.format(copy=copy) for o in overrides))
    height, width = config.data.size
    with pytest.raises(UserError) as caught:
        check_stage1(config, kind, (2, height // 16, width // 16))
    text = str(caught.value)
    assert text.startswith(f"objectives.{key}: {networks[kind]} was trained on other tokens")
    assert expected.format(copy=copy, teacher=teacher_folder) in text and "\n" not in text


def test_path_and_grid_may_be_written_in_another_way(
    stage2: MakeConfig, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(teacher_folder.parent)
    build_run(stage2(f"teachers.dino.path=./{teacher_folder.name}", "teachers.dino.grid=[3,3]"))


def test_stage_2_refuses_folders_that_are_none(
    stage2: MakeConfig, networks: Recipes, tmp_path: Path
) -> None:
    def message(kind: str, setting: str, folder: Path, *overrides: str) -> str:
        config = stage2(*overrides)
        objective = config.objectives[kind].model_copy(update={setting: str(folder)})
        with pytest.raises(UserError) as caught:
            build_run(config.model_copy(update={"objectives": {kind: objective}}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "grid 3x3 there, 3x4 here" in message(
        "sara", "aligner", networks["sara"], "data.size=[48,64]"
    )
    other = message("moalign", "head", networks["sara"])
    assert other.startswith("objectives.moalign.head: ")
    assert "holds a Stage 1 of sara, not of moalign" in other
    nowhere = message("sara", "aligner", tmp_path)
    assert nowhere.startswith("objectives.sara.aligner: ")
    assert "`alignlab stage1 sara RECIPE` makes one" in nowhere
    damaged = shutil.copytree(networks["sara"], tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"garbage")
    broken = message("sara", "aligner", damaged)
    assert broken.startswith("objectives.sara: ") and "cannot be read" in broken


def test_another_text_encoder_is_pointed_out(
    stage2: MakeConfig, wan_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_run(stage2())
    assert "text encoder" not in caplog.text
    copy = shutil.copytree(wan_folder, tmp_path / "wan")
    build_run(stage2(f"model.path={copy}"))
    assert f"text encoder of {wan_folder}, this run has that of {copy}" in caplog.text
