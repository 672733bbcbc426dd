"""Variants that are measured differently are refused, unless the recipe allows it by name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, dump_compare, load_compare
from alignlab.experiments.compare.fairness import check_fair, differences
from alignlab.experiments.compare.run import compare

Make = Callable[..., CompareConfig]


@pytest.fixture
def make(recipe_file: Path, tmp_path: Path) -> Make:
    """`make("eval: {clips: 3}")`: a baseline and a variant with these changes."""

    def config(changes: str, extra: str = "") -> CompareConfig:
        path = tmp_path / "fair.yaml"
        variants = f"baseline: none\nseeds: [0]\nvariants:\n  none: {{}}\n  other: {{{changes}}}\n"
        path.write_text(recipe_file.read_text() + variants + extra)
        return load_compare(path, [f"output={tmp_path}"])

    return config


@pytest.mark.parametrize(
    "changes",
    [
        "optim.lr: 1e-4",
        "steps: 1",
        "objectives.ra.weight: 0.1",
        "model.train: lora",
        "data.cache.mode: read",
    ],
)
def test_variants_may_train_differently(make: Make, changes: str) -> None:
    check_fair(make(changes))


def test_what_a_variant_starts_from_is_a_difference(make: Make) -> None:
    config = make("model.init_from: runs/first")
    check_fair(config)
    assert differences(config) == {"model.init_from": {"none": None, "other": "runs/first"}}


def test_the_path_of_an_expert_says_where_its_window_is(make: Make) -> None:
    check_fair(make("model.path: somebody/another"))
    allowed = "allow_differences: [model.expert]\n"
    with pytest.raises(UserError, match=r"model\.path: variants are measured differently"):
        check_fair(make("model.path: somebody/another, model.expert: high", allowed))
    config = make("model.expert: high", allowed)
    check_fair(config)
    assert differences(config) == {"model.expert": {"none": None, "other": "high"}}


@pytest.mark.parametrize(
    ("changes", "setting", "shown"),
    [
        ("eval.sample_steps: 3", "eval.sample_steps", "none: 2, other: 3"),
        ("data.val_clips: 5", "data.val_clips", "none: 4, other: 5"),
        ("data.seed: 1", "data.seed", "none: 0, other: 1"),
        ("teachers.dino.feature: pre_norm", "teachers.dino.feature", "other: pre_norm"),
        ("model.expert: low", "model.expert", "none: None, other: low"),
    ],
)
def test_other_measurements_are_refused_before_training(
    make: Make, tmp_path: Path, changes: str, setting: str, shown: str
) -> None:
    with pytest.raises(UserError) as info:
        compare(make(changes))
    assert str(info.value).startswith(f"{setting}: variants are measured differently (")
    assert shown in str(info.value) and f"allow_differences: [{setting}]" in str(info.value)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "run").exists()
    check_fair(make(changes, f"allow_differences: [{setting}]\n"))


def test_clips_are_generated_with_one_shift(make: Make, tmp_path: Path) -> None:
    check_fair(make("flow.shift: 3.0"))  # nothing is generated
    generating = (tmp_path / "fair.yaml").read_text().replace("sample_clips: 0", "sample_clips: 1")
    (tmp_path / "fair.yaml").write_text(generating)
    with pytest.raises(UserError, match=r"eval\.sample_shift: .* \(none: 5.0, other: 3.0\)"):
        check_fair(load_compare(tmp_path / "fair.yaml"))
    check_fair(load_compare(tmp_path / "fair.yaml", ["eval.sample_shift=5"]))


def test_a_teacher_that_only_trains_may_differ(make: Make) -> None:
    second = "teachers.late: {family: dinov2, path: x, feature: post_norm}"
    check_fair(make(f"{second}, objectives.ra.teacher: late"))
    with pytest.raises(UserError, match=r"eval\.teacher: .* \(none: dino, other: late\)"):
        check_fair(make(f"{second}, eval.teacher: late", "allow_differences: []\n"))


@pytest.mark.parametrize("name", ["optim.lr", "eval.sample_step", "eval.clips"])
def test_allowing_what_is_no_difference_is_an_error(make: Make, name: str) -> None:
    config = make("eval.sample_steps: 3, optim.lr: 1e-4", f"allow_differences: [{name}]\n")
    with pytest.raises(UserError, match=rf"allow_differences: unknown difference '{name}'"):
        check_fair(config)


def test_differences_and_allowance_survive_the_dump(make: Make, tmp_path: Path) -> None:
    config = make("eval.sample_steps: 3", "allow_differences: [eval.sample_steps]\n")
    assert differences(config) == {"eval.sample_steps": {"none": 2, "other": 3}}
    again = tmp_path / "again.yaml"
    again.write_text(dump_compare(config))
    assert load_compare(again) == config
