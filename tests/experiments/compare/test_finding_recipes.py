"""Recipes that check a published finding: what is refused before training, and those that ship."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.config.recipe_file import recipe_folder, shipped_recipes
from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, load_compare
from alignlab.experiments.compare.fairness import check_fair
from alignlab.experiments.compare.measured import check_expectations
from alignlab.experiments.compare.run import prepare, probed
from alignlab.recipe import recipe_hash
from alignlab.training.aligned_samples import check_recipe

SHIPPED = sorted(name for name in shipped_recipes() if name.startswith("findings/"))
EXPECT = {"variant": "repa", "metric": "val/flow", "change": "lower"}
FINDING = {"claim": "It is so.", "source": "arXiv 1234.56789", "limits": "It is small."}

Load = Callable[..., CompareConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """`load(changes of the one expectation, overrides...)`: the demo with a finding."""

    def made(changes: dict[str, Any], *overrides: str, **finding: Any) -> CompareConfig:
        recipe = yaml.safe_load((recipe_folder() / "demo.yaml").read_text())
        recipe["finding"] = FINDING | {"expect": [EXPECT | changes]} | finding
        path = tmp_path / "checked.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return load_compare(path, [f"output={tmp_path}", *overrides])

    return made


def message(action: Callable[..., object], *arguments: Any, **named: Any) -> str:
    with pytest.raises(UserError) as caught:
        action(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_finding_is_read_and_changes_no_run(load: Load) -> None:
    config, plain = load({}), load_compare("demo")
    assert config.finding is not None and config.finding.expect[0].metric == "val/flow"
    for variant in plain.variants:
        assert recipe_hash(config.run(variant, 0)) == recipe_hash(plain.run(variant, 0))
    assert load({}, "finding=null").finding is None


@pytest.mark.parametrize(
    ("expect", "finding", "expected"),
    [
        ({"variant": "rapa"}, {}, "finding.expect.0.variant: unknown variant 'rapa', did you mean"),
        ({"variant": "none"}, {}, "finding.expect.0.variant: none is the baseline"),
        ({"change": "better"}, {}, "finding.expect.0.change"),
        ({"metrik": "x"}, {}, "metrik"),
        ({}, {"expect": []}, "finding.expect"),
        ({}, {"expect": [EXPECT, EXPECT]}, "expect.1: val/flow of repa is expected twice"),
        ({}, {"claim": ""}, "finding.claim"),
        ({}, {"limits": "two\nlines"}, "line break"),
    ],
)
def test_what_is_no_finding_is_refused_where_the_recipe_is_read(
    load: Load, expect: dict[str, Any], finding: dict[str, Any], expected: str
) -> None:
    assert expected in message(load, expect, **finding)


def test_a_variant_that_is_taken_out_leaves_its_finding_without_one(load: Load) -> None:
    assert "finding=null leaves" in message(load, {}, "variants.repa=null")
    assert load({}, "variants.repa=null", "finding=null").finding is None


@pytest.mark.parametrize(
    ("metric", "overrides", "expected"),
    [
        ("val/flaw", [], "unknown metric 'val/flaw', did you mean 'val/flow'?"),
        ("cknna/block7", [], "valid: cknna/block0, cknna/block1"),
        ("gen_real/frechet", [], "no training changes it"),
        ("gen/frechet", ["eval.generated_clips=0"], "no generated clip is measured"),
        ("silhouette/mean", ["data.references=[1,1]"], "silhouette needs two references"),
        ("steps_to_target", [], "set eval.every"),
        ("cost/step", ["cost=null"], "is not measured with cost: null"),
    ],
)
def test_a_metric_that_is_never_measured_is_refused_before_training(
    load: Load, metric: str, overrides: list[str], expected: str, tmp_path: Path
) -> None:
    config = load({"metric": metric}, *overrides)
    text = message(prepare, config)
    assert text.startswith("finding.expect.0.metric: ") and expected in text
    assert not (tmp_path / "demo").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("metric", "overrides"),
    [
        ("cknna/block4", []),
        ("gen/identity_proxy", []),
        ("val/flow/t3", []),
        ("time/step", []),
        ("steps_to_target", ["eval.every=20"]),
        ("cost/gflop", []),
    ],
)
def test_every_kind_of_metric_can_be_expected(
    load: Load, metric: str, overrides: list[str]
) -> None:
    measurable(load({"metric": metric}, *overrides))


def measurable(config: CompareConfig) -> None:
    check_fair(config)
    check_expectations(config, {v: probed(config, v, config.seeds[0]) for v in config.variants})


def test_findings_are_shipped() -> None:
    assert len(SHIPPED) >= 10


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_finding_can_come_out(name: str) -> None:
    config = load_compare(name)
    measurable(config)
    for run in config.runs.values():
        check_recipe(run)
    assert config.finding is not None and "arXiv " in config.finding.source
    assert len(config.seeds) >= 5 and len(config.variants) <= 4
    assert config.name == name and config.cost is None
    expected = {expectation.variant for expectation in config.finding.expect}
    assert expected == {*config.variants} - {config.baseline}, "a variant that nothing is said of"


@pytest.mark.parametrize("init", ["random", "trained"])
def test_shipped_findings_share_what_is_encoded(init: str) -> None:
    """From scratch and in fine-tuning, all read one set of clips each."""
    first, *others = [
        config.data
        for config in (load_compare(name).base for name in SHIPPED)
        if config.model.init == init
    ]
    assert others and all(data == first for data in others)
