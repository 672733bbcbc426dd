"""Stage 2 on the folders of Stage 1: it trains, and refuses what does not fit in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.runs.metric_rows import read_rows
from alignlab.stage1.compatibility import check_stage1
from alignlab.teachers import load_teacher
from alignlab.train import train
from alignlab.training.setup import build_run

MakeConfig = Callable[..., RunConfig]
Recipes = dict[str, Path]


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


def altered(teacher: Path) -> Path:
    """The folder with another bias in its last norm."""
    file = teacher / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "layernorm.bias": tensors["layernorm.bias"] + 1}, file)
    return teacher


def check(config: RunConfig, kind: str) -> None:
    row, (height, width) = config.teachers["dino"], config.data.size
    teacher = load_teacher(row.family, path=row.path, feature=row.feature)
    grid, text = (2, height // 16, width // 16), config.model.path
    check_stage1(kind, config.objectives[kind], row, teacher, grid=grid, text=text)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["teachers.dino.feature=pre_norm"], "teacher feature post_norm there, pre_norm here"),
        (["data.size=[48,64]"], "grid 3x3 there, 3x4 here"),
        (["teachers.dino.grid=[6,6]"], "grid 3x3 there, 6x6 here"),
        (["teachers.dino.family=tiny-dino"], "teacher family dinov2 there, tiny-dino here"),
        (
            ["teachers.dino.path={copy}"],
            "teacher weights of {teacher} there, others of {copy} here",
        ),
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
    copy = altered(shutil.copytree(teacher_folder, tmp_path / "copy"))
    config = stage2(*(o.format(copy=copy) for o in overrides))
    with pytest.raises(UserError) as caught:
        check(config, kind)
    text = str(caught.value)
    assert text.startswith(f"objectives.{key}: {networks[kind]} was trained on other tokens")
    assert expected.format(copy=copy, teacher=teacher_folder) in text and "\n" not in text


def test_a_copy_of_the_teacher_is_the_same_teacher(
    stage2: MakeConfig, teacher_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(teacher_folder, tmp_path / "copy")
    check(stage2(f"teachers.dino.path={copy}"), "sara")


def test_without_a_recorded_digest_the_path_counts(
    stage2: MakeConfig, networks: Recipes, teacher_folder: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(networks["sara"], tmp_path / "old")
    info = json.loads((old / "stage1.json").read_text())
    assert len(info["teacher"].pop("weights")) == 64
    (old / "stage1.json").write_text(json.dumps(info))
    (old / "checksums.json").unlink()  # older ones had none

    def with_old(config: RunConfig) -> RunConfig:
        sara = config.objectives["sara"].model_copy(update={"aligner": str(old)})
        return config.model_copy(update={"objectives": {"sara": sara}})

    check(with_old(stage2()), "sara")
    copy = shutil.copytree(teacher_folder, tmp_path / "copy")
    with pytest.raises(UserError, match=f"teacher path {teacher_folder} there, {copy} here"):
        check(with_old(stage2(f"teachers.dino.path={copy}")), "sara")


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
    assert broken.startswith("objectives.sara.aligner: ")
    assert f"{damaged / 'model.safetensors'} is damaged" in broken


def test_another_text_encoder_is_pointed_out(
    stage2: MakeConfig, wan_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_run(stage2())
    assert "text encoder" not in caplog.text
    copy = shutil.copytree(wan_folder, tmp_path / "wan")
    build_run(stage2(f"model.path={copy}"))
    assert f"text encoder of {wan_folder}, this run has that of {copy}" in caplog.text


@pytest.mark.parametrize(("kind", "setting"), [("sara", "aligner"), ("moalign", "head")])
@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_stage_2_refuses_networks_that_are_not_finite_or_all_zero(
    stage2: MakeConfig, networks: Recipes, tmp_path: Path, kind: str, setting: str, value: float
) -> None:
    folder = shutil.copytree(networks[kind], tmp_path / "spoilt")
    (folder / "checksums.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.mul(value) for name, t in tensors.items()}, folder / "model.safetensors")
    config = stage2()
    objective = config.objectives[kind].model_copy(update={setting: str(folder)})
    with pytest.raises(
        UserError, match=f"^objectives.{kind}: its Stage 1 network: .* (finite|zero)"
    ):
        build_run(config.model_copy(update={"objectives": {kind: objective}}))
