"""Objectives, Stage 1 networks and teachers of other packages: a real one, installed; bad ones."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from alignlab.losses.plugins import PluginError
from alignlab.losses.registry import BUILT_IN, STAGE1, installed_objectives
from alignlab.losses.stage1.folder import BUILT_IN as BUILT_IN_STAGE1
from alignlab.losses.stage1.folder import INFO, installed_stage1, read_stage1_info, stage1_rows
from alignlab.losses.testing.contract import CHECKS
from alignlab.recipe import dump, load_run
from alignlab.teachers.registry import BUILT_IN as BUILT_IN_TEACHERS
from alignlab.teachers.registry import installed_teachers
from made_packages import anew, answers, pip_install, run_python, write_package

PACKAGE = Path(__file__).with_name("external")


PRINTED = ("train", "tiny", "--print-config")
OBJECTIVE = "objectives: {ra: {name: unit_distance, teacher: dino, blocks: [1]}}\n"
UNTAUGHT = "objectives={l: {name: latent_error, blocks: [1]}, s: {name: spread}}"
SMALL = (
    *("steps=2", "data.train_clips=2", "data.val_clips=2", "eval.clips=2", "optim.batch_size=2"),
    *("data.frames=5", "data.size=[48,48]", "eval.sample_clips=0", "eval.generated_clips=0"),
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the external package, offline."""
    source = tmp_path_factory.mktemp("source") / "package"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("installed")
    pip_install(source, target)
    return target


def test_what_is_installed_is_listed_and_recipes_can_name_it(
    installed: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = dump(load_run("tiny", ["objectives={}"]))
    recipe.write_text(text.replace("objectives: {}\n", OBJECTIVE))
    objectives, teachers, teacher, objective, wrong_teacher, wrong_setting = answers(
        installed,
        ("list", "objectives"),
        ("list", "teachers"),
        (*PRINTED, "teachers.half={family: half-dino}"),
        ("train", str(recipe), "--print-config"),
        (*PRINTED, "teachers.half={family: half-dyno}"),
        ("train", str(recipe), "objectives.ra.scala=2"),
    )
    assert objectives.code == 0, objectives.stderr
    names = [line for line in objectives.stdout.splitlines() if not line.startswith(" ")]
    assert names == [*BUILT_IN, "gram", "latent_error", "spread", "unit_distance"]
    assert "Squared distance of unit vectors." in objectives.stdout
    assert "  video tokens; reads the clean latents; weight 1.0; blocks 1\n" in objectives.stdout

    assert teachers.code == 0, teachers.stderr
    _, rest = teachers.stdout.split("half-dino\n")
    assert rest.splitlines()[:2] == [
        "  assets/tiny-dino, pre_norm, unless set",
        "  takes frames",
    ]

    assert teacher.code == 0, teacher.stderr
    assert "family: half-dino" in teacher.stdout and "feature: pre_norm" in teacher.stdout
    assert wrong_teacher.code == 2
    assert "unknown family 'half-dyno', did you mean 'half-dino'?" in wrong_teacher.stderr

    assert objective.code == 0, objective.stderr
    assert "name: unit_distance" in objective.stdout and "scale: 1.0" in objective.stdout
    assert wrong_setting.code == 2
    line = "objectives.ra.scala: unknown key 'scala', did you mean 'scale'?"
    assert line in wrong_setting.stderr


def test_one_that_reads_no_teacher_trains_in_a_recipe_without_any(
    installed: Path, tmp_path: Path
) -> None:
    recipe = ("name=untaught", "objectives={}", UNTAUGHT, "teachers={}", *SMALL)
    settings = (*recipe, "tracking.mlflow=none", f"output={tmp_path}")
    trained, taught, deep = answers(
        installed,
        ("train", "tiny", *settings),
        ("train", "tiny", *settings, "objectives.l.teacher=dino"),
        ("train", "tiny", *settings, "objectives.s.far=70", "name=deep"),
    )
    assert trained.code == 0, trained.stderr
    rows = (tmp_path / "untaught" / "metrics.jsonl").read_text()
    assert '"loss/l"' in rows and '"loss/s"' in rows
    assert taught.code == 2
    assert "error: objectives.l: latent_error reads no teacher; remove teacher\n" in taught.stderr
    assert "objectives.s.far: block 70 does not exist" in deep.stderr


def test_its_own_tests_pass(installed: Path, tmp_path: Path) -> None:
    """The contract of its objectives, and its Stage 1 network."""
    names = ("contract_of_tiny_objective.py", "stage1_of_tiny_objective.py")
    files = [Path(shutil.copy(PACKAGE / name, tmp_path)) for name in names]
    done = run_python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{4 * len(CHECKS) + 2} passed" in done.stdout


USE = """
import tiny_teacher  # before alignlab looks for it

import torch
from alignlab.teachers import TEACHERS, load_teacher

assert TEACHERS["half-dino"] is tiny_teacher.HALF_DINO
frames = torch.randint(0, 256, (1, 2, 64, 64, 3), dtype=torch.uint8)
ours, its = (
    load_teacher(family, feature="pre_norm").encode(frames, (4, 4)).tokens_BTPD
    for family in ("tiny-dino", "half-dino")
)
assert ours.shape == its.shape and not torch.allclose(ours, its, atol=0.01)
"""


def test_an_installed_teacher_is_used(installed: Path) -> None:
    anew(installed, lambda: exec(USE, {}))


def test_a_stage1_folder_of_a_package_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    teacher = {"family": "dinov2", "path": "x", "feature": "post_norm"}
    info = {"kind": "unit_distance", "teacher": teacher, "teacher_dim": 5, "grid": [2, 3]}
    (tmp_path / INFO).write_text(json.dumps(info | {"module": {"teacher_dim": 5}}))
    with pytest.raises(ValueError, match=r"kind: Input should be 'sara' or 'moalign'$"):
        read_stage1_info(tmp_path, "unit_distance")


def test_stage1_rows_name_a_setting_of_their_objective() -> None:
    assert stage1_rows() == STAGE1 == BUILT_IN_STAGE1
    for name, row in BUILT_IN_STAGE1.items():
        assert row.setting in BUILT_IN[name].Config.model_fields


BAD = """
from typing import ClassVar, Literal, final

from alignlab.losses.objective import NoTeacherConfig, Objective, ObjectiveConfig
from alignlab.losses.repa import Repa
from alignlab.losses.stage1.folder import Stage1Row
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig


class NotFinal(Objective): ...


class OtherConfig(ObjectiveConfig):
    name: Literal["other"] = "other"


class LooseConfig(ObjectiveConfig):
    name: str = "bad"


@final
class NoTokens(Objective): ...


@final
class NoConfig(Objective):
    tokens = "video"


@final
class OtherName(Objective):
    tokens, Config = "video", OtherConfig


class Sound(ObjectiveConfig):
    name: Literal["bad"] = "bad"


class WithoutTeacher(NoTeacherConfig):
    name: Literal["bad"] = "bad"


@final
class ReadsPixels(Objective):
    tokens, reads, Config = "video", "pixels", Sound


@final
class ReadsNothingWithTeacher(Objective):
    tokens, reads, Config = "video", "nothing", Sound


@final
class ReadsNoTeacherThatItHas(Objective):
    tokens, Config = "video", WithoutTeacher


@final
class ReadsItselfUnsettled(Objective):
    tokens, reads, Config = "video", "self", WithoutTeacher


@final
class ReadsLatentsOfReferences(Objective):
    tokens, reads, Config = "reference", "latents", WithoutTeacher


@final
class LooseName(Objective):
    tokens, Config = "video", LooseConfig


function = print
no_module = Stage1Row(print, MotionHeadConfig, "head")
no_config = Stage1Row(MotionHead, dict, "head")
no_width = Stage1Row(MotionHead, OtherConfig, "head")
"""


def register(
    folder: Path, package: str, *, group: str = "alignlab.objectives", **entries: str
) -> None:
    """Installs a package with the module above, which registers `entries` in a group."""
    (folder / "bad_objectives.py").write_text(BAD)
    write_package(folder, package, group, **entries)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("repa", "alignlab.losses.repa:Repa", "alignlab has that name already"),
        ("bad", "no_such_module:X", "cannot load no_such_module:X: No module named"),
        ("bad", "bad_objectives:Nothing", "cannot load bad_objectives:Nothing: module"),
        ("bad", "broken_module:X", "cannot load broken_module:X: it does not work here"),
        ("bad", "ending_module:X", "cannot load ending_module:X: SystemExit: no card"),
        ("bad", "bad_objectives:function", "is no class derived from alignlab.losses.objective"),
        ("bad", "bad_objectives:NotFinal", "is not final"),
        ("bad", "bad_objectives:NoTokens", "must say which tokens it taps"),
        ("bad", "bad_objectives:NoConfig", "has no Config derived from"),
        (
            "bad",
            "bad_objectives:ReadsPixels",
            "reads 'pixels': choose teacher, self, latents, nothing",
        ),
        ("bad", "bad_objectives:ReadsNothingWithTeacher", "reads nothing: derive its Config from"),
        ("bad", "bad_objectives:ReadsNoTeacherThatItHas", "has a Config without a teacher"),
        ("bad", "bad_objectives:ReadsLatentsOfReferences", "reads latents, which is of the video"),
        (
            "bad",
            "bad_objectives:ReadsItselfUnsettled",
            "derive its Config from alignlab.losses.obj",
        ),
        ("bad", "bad_objectives:OtherName", 'has a Config without the line: name: Literal["bad"]'),
        ("bad", "bad_objectives:LooseName", 'has a Config without the line: name: Literal["bad"]'),
        ("bad", "alignlab.losses.repa:Repa", 'has a Config without the line: name: Literal["bad"]'),
    ],
)
def test_a_bad_one_is_told_with_its_package(
    name: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(tmp_path, "bad-package", **{name: value})
    (tmp_path / "broken_module.py").write_text('raise RuntimeError("it does not\\nwork here")')
    (tmp_path / "ending_module.py").write_text('raise SystemExit("no card")')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError) as error:
        installed_objectives(BUILT_IN)
    assert str(error.value).startswith(f"package bad-package registers objective {name!r}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sara", "bad_objectives:no_width", "alignlab has that name already"),
        ("bad", "no_such_module:X", "cannot load no_such_module:X: No module named"),
        ("bad", "bad_objectives:function", "is no alignlab.losses.stage1.folder.Stage1Row"),
        ("bad", "bad_objectives:no_module", "has a network that is no class derived from torch"),
        ("bad", "bad_objectives:no_config", "has a config that is no class derived from pydantic"),
        ("bad", "bad_objectives:no_width", "a config, OtherConfig, without the field teacher_dim"),
    ],
)
def test_a_bad_stage1_row_is_told_with_its_package(
    name: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(tmp_path, "bad-package", group="alignlab.stage1", **{name: value})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError) as error:
        installed_stage1(BUILT_IN_STAGE1)
    assert str(error.value).startswith(f"package bad-package registers Stage 1 network {name!r}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


BAD_TEACHERS = """
from alignlab.teachers.registry import TeacherRow

SOUND = dict(classes={"clip": "CLIPVisionModel"}, path="a/b", feature="post_norm")
function = print
no_path = TeacherRow(**(SOUND | {"path": ""}))
odd_features = TeacherRow(**SOUND, features=("post_norm", "pooled"))
other_feature = TeacherRow(**(SOUND | {"feature": "stage:3"}))
odd_filter = TeacherRow(**SOUND, resize="nearest")
odd_std = TeacherRow(**SOUND, std=(0.0, 1.0, 1.0))
"""


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dinov2", "bad_teachers:no_path", "alignlab has that name already"),
        ("bad", "no_such_module:X", "cannot load no_such_module:X: No module named"),
        ("bad", "bad_teachers:function", "is no alignlab.teachers.registry.TeacherRow"),
        ("bad", "bad_teachers:no_path", "has no classes or no path"),
        (
            "bad",
            "bad_teachers:odd_features",
            "has features post_norm, pooled: choose from pre_norm",
        ),
        (
            "bad",
            "bad_teachers:other_feature",
            "has the feature 'stage:3', which is none of pre_norm",
        ),
        ("bad", "bad_teachers:odd_filter", "has resize 'nearest': choose from bicubic, bilinear"),
        ("bad", "bad_teachers:odd_std", "no std of 3 positive ones"),
    ],
)
def test_a_bad_teacher_is_told_with_its_package(
    name: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(tmp_path, "bad-package", group="alignlab.teachers", **{name: value})
    (tmp_path / "bad_teachers.py").write_text(BAD_TEACHERS)
    monkeypatch.delitem(sys.modules, "bad_teachers", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError) as error:
        installed_teachers(BUILT_IN_TEACHERS)
    assert str(error.value).startswith(f"package bad-package registers teacher {name!r}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_packages_cannot_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("one", "two"):
        register(tmp_path, package, repa2="bad_objectives:Repa")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("alignlab.losses.registry._problem", lambda thing, name: None)
    with pytest.raises(PluginError, match=r"package two .*'repa2': package one has that name"):
        installed_objectives(BUILT_IN)


def test_the_command_line_tells_it_in_one_line(tmp_path: Path) -> None:
    register(tmp_path, "bad-package", bad="bad_objectives:function")
    done = run_python(tmp_path, "-m", "alignlab.cli", "list", "objectives")
    assert done.returncode == 2
    assert done.stderr.startswith("error: package bad-package registers objective 'bad'")
    assert done.stderr.count("\n") == 1
