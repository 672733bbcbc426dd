"""A new setting orphans nothing: hashes of older recipes, of whatever version, still hold."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, create_model

from alignlab.config.identity import has_hash, settings_hash
from alignlab.config.parts import EvalConfig, TrainingConfig
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.sweep.config import SweepConfig, load_sweep
from alignlab.experiments.sweep.study import NUMBERLESS
from alignlab.recipe import has_recipe_hash, load_run, load_stage1_run, recipe_hash
from alignlab.runs.run_folder import RunFolder

# Written by the code that hashed recipes whole.
V1_RUNS = {"tiny": "b6bc555c0ea3"}
# Of a run on a folder, whose clips were dealt to the splits by another rule.
OLD_FOLDER_RUN = ("wan21_1.3b_8gpu", ("709ff9f600c3", "v2-3429818de017"))
V1_STAGE1 = {"sara": "7acf09ccf3a1", "moalign": "ce5542bf865c"}
V1_SWEEP = "60f7d50dea11"
# Of `tiny` and a videorepa, written when its projectors had no choice of initial weights.
V2_WITH_VIDEOREPA = "v2-5ac9f66fed94"


# What that recipe says since, put back.
OLDER_WAN = (
    "data.path=x",
    "data.fps=16",
    "model.absent_references=none",
    "optim.grad_clip=1.0",
    "eval.negative_prompt=''",
)


def run_of(name: str) -> RunConfig:
    return load_run(name, list(OLDER_WAN) if name.startswith("wan") else [])


def with_new_settings(config: TrainingConfig) -> TrainingConfig:
    """The same recipe under classes that have one more setting each, at two levels."""
    fields: dict[str, Any] = {"added": (str, "as before")}
    if isinstance(config, RunConfig):
        new_eval = create_model("EvalConfig", __base__=EvalConfig, added=(int, 3))
        fields["eval"] = (new_eval, Field(default=new_eval()))
    new: Any = create_model(type(config).__name__, __base__=type(config), **fields)
    made: TrainingConfig = new.model_validate(config.model_dump(mode="json"))
    return made


@pytest.mark.parametrize("name", V1_RUNS)
def test_old_and_new_hashes_of_runs_hold_when_settings_are_added(name: str) -> None:
    config = run_of(name)
    later = with_new_settings(config)
    assert "added" in later.model_dump() and "added" in later.model_dump()["eval"]
    for known in (V1_RUNS[name], recipe_hash(config)):
        assert has_recipe_hash(config, known)
        assert has_recipe_hash(later, known)
    assert recipe_hash(later) == recipe_hash(config)


def test_hashes_of_runs_whose_clips_were_dealt_otherwise_hold_no_more() -> None:
    name, known = OLD_FOLDER_RUN
    config = run_of(name)
    assert has_recipe_hash(with_new_settings(config), recipe_hash(config))
    assert not any(has_recipe_hash(config, one) for one in known)


@pytest.mark.parametrize("kind", V1_STAGE1)
def test_old_hashes_of_stage1_hold_when_a_setting_is_added(kind: str) -> None:
    config = load_stage1_run(kind, f"stage1_{kind}")
    assert has_recipe_hash(config, V1_STAGE1[kind])
    assert has_recipe_hash(with_new_settings(config), V1_STAGE1[kind])


def test_old_and_new_hashes_of_sweeps_hold_when_settings_are_added() -> None:
    config = load_sweep("sweep_refalign")
    new: Any = create_model(
        "SweepConfig", __base__=SweepConfig, added=(int, 1), base=(RunConfig, Field())
    )
    values = {name: getattr(config, name) for name in SweepConfig.model_fields}
    later = new.model_validate(values | {"base": with_new_settings(config.base)})
    for known in (V1_SWEEP, settings_hash(config, NUMBERLESS)):
        assert has_hash(config, known, NUMBERLESS)
        assert has_hash(later, known, NUMBERLESS)


@pytest.mark.parametrize(
    "override",
    ["steps=99", "seed=5", "objectives.ra.weight=0.25", "eval.clips=7", "data.seed=1",
     "teachers.dino.feature=pre_norm", "optim.ema=0.9", "objectives.ra.gate=t^2",
     "objectives.b={name: repa, teacher: dino, blocks: [3]}"],
)  # fmt: skip
def test_every_number_of_a_recipe_counts(override: str) -> None:
    config, other = load_run("tiny"), load_run("tiny", [override])
    assert recipe_hash(config) != recipe_hash(other)
    assert not has_recipe_hash(other, recipe_hash(config))
    assert not has_recipe_hash(other, V1_RUNS["tiny"])


def test_a_setting_that_is_given_its_default_changes_nothing() -> None:
    assert recipe_hash(load_run("tiny", ["eval.clips=16"])) == recipe_hash(load_run("tiny"))


@pytest.mark.parametrize(
    "override",
    ["name=other", "output=x", "checkpoint.every=7", "tracking.log_every=3", "data.cache.mode=off"],
)
def test_what_changes_no_number_is_left_out(override: str) -> None:
    assert has_recipe_hash(load_run("tiny", [override]), recipe_hash(load_run("tiny")))
    assert has_recipe_hash(load_run("tiny", [override]), V1_RUNS["tiny"])


def test_two_objectives_with_nothing_but_defaults_are_not_the_same() -> None:
    base = ["objectives.ra.weight=1.0"]
    repa = load_run("tiny", [*base, "objectives.x={name: repa, teacher: dino, blocks: [3]}"])
    irepa = load_run("tiny", [*base, "objectives.x={name: irepa, teacher: dino, blocks: [3]}"])
    assert recipe_hash(repa) != recipe_hash(irepa)


def test_a_new_setting_that_is_used_is_another_recipe() -> None:
    config = load_run("tiny")
    new = create_model("EvalConfig", __base__=EvalConfig, added=(int, 3))
    later: Any = create_model("RunConfig", __base__=RunConfig, eval=(new, Field(default=new())))
    used = later.model_validate(config.model_dump(mode="json") | {"eval": {"added": 9}})
    for known in (V1_RUNS["tiny"], recipe_hash(config)):
        assert not has_recipe_hash(used, known)


def test_what_is_left_out_of_a_part_never_counts() -> None:
    config, other = load_run("tiny"), load_run("tiny", ["eval.clips=7"])
    left_out = {"eval": {"clips": True}}
    assert settings_hash(config, left_out) == settings_hash(other, left_out)
    assert settings_hash(config) != settings_hash(other)


def test_the_order_of_objectives_and_teachers_counts() -> None:
    teacher = "teachers.late={family: dinov2, path: assets/tiny-dino, feature: pre_norm}"
    config = load_run("tiny", [teacher])
    swapped = config.model_copy(update={"teachers": dict(reversed(config.teachers.items()))})
    assert config.measured_against != swapped.measured_against
    assert recipe_hash(config) != recipe_hash(swapped)


def with_videorepa(*overrides: str, more: str = "") -> RunConfig:
    settings = f"name: videorepa, teacher: dino, blocks: [3], projector_dim: 64{more}"
    return load_run("tiny", [f"objectives.vr={{{settings}}}", *overrides])


XAVIER = ", initial_weights: xavier"


def test_an_older_recipe_is_not_one_whose_default_has_changed_since() -> None:
    """VideoREPA's projectors began with Xavier weights when recipes could not say so."""
    config, as_then = with_videorepa(), with_videorepa(more=XAVIER)
    assert recipe_hash(as_then) == V2_WITH_VIDEOREPA
    assert has_recipe_hash(as_then, V2_WITH_VIDEOREPA)
    assert not has_recipe_hash(config, V2_WITH_VIDEOREPA)
    explicit = with_videorepa(more=", initial_weights: torch")
    assert recipe_hash(explicit) == recipe_hash(config) != V2_WITH_VIDEOREPA


def test_an_older_run_folder_is_not_resumed_with_the_new_default(tmp_path: Path) -> None:
    output = f"output={tmp_path}"
    config, as_then = with_videorepa(output), with_videorepa(output, more=XAVIER)
    folder = RunFolder.create(config)
    (folder.checkpoints / "step-000001").mkdir(parents=True)
    assert RunFolder.create(config).config() == config  # one of today resumes
    lines = folder.recipe.read_text().splitlines(keepends=True)[1:]  # older ones had no checksum
    folder.recipe.write_text("".join(line for line in lines if "initial_weights" not in line))
    with pytest.raises(UserError, match=r"vr\.initial_weights was xavier, is torch"):
        RunFolder.create(config)
    assert folder.config() == as_then
    assert RunFolder.create(as_then).config() == as_then
