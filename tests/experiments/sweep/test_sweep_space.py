"""Search spaces: what is refused before any trial, and how params become recipe values."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from alignlab.errors import UserError
from alignlab.experiments.sweep import samplers as sweep_samplers
from alignlab.experiments.sweep.config import SweepConfig, dump_sweep, load_sweep
from alignlab.experiments.sweep.samplers import build_sampler
from alignlab.experiments.sweep.space import (
    apply_values,
    distributions,
    grid_points,
    own_params,
    suggest_values,
    tapped_blocks,
    value_of,
)
from alignlab.experiments.sweep.worker import check
from alignlab.losses.gate import PowerGate
from alignlab.recipe import load_run

MakeSweep = Callable[..., SweepConfig]

SWEEP = """
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
  objectives.ra.blocks: {kind: blocks, choose: subset, last: 3, max_size: 2}
  objectives.ra.gate:
    kind: categorical
    choices: [none, t^3, {kind: window, low: 0.1, high: 0.5}]
  optim.warmup: {kind: int, low: 0, high: 2}
metric: val/flow
trials: 4
"""


@pytest.fixture
def make(recipe_file: Path, tmp_path: Path) -> MakeSweep:
    path = tmp_path / "sweep.yaml"
    path.write_text(recipe_file.read_text() + SWEEP)
    return lambda *overrides: load_sweep(path, [f"output={tmp_path}", *overrides])


def blocks(**settings: object) -> str:
    settings = {"max_size": "null", **settings}  # an override is merged into the recipe's
    fields = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"space.objectives.ra.blocks={{kind: blocks, {fields}}}"


def searched(key: str, *choices: object) -> str:
    return f"space.{key}={{kind: categorical, choices: {json.dumps(choices)}}}"


def test_a_sweep_loads_again_from_its_dump(make: MakeSweep, tmp_path: Path) -> None:
    config = make("space.objectives.ra.weight.high=3")
    path = tmp_path / "again.yaml"
    path.write_text(dump_sweep(config))
    assert load_sweep(path) == config
    assert config.space["objectives.ra.weight"].model_dump()["high"] == 3
    assert config.seeds == (0,)
    with pytest.raises(UserError, match="use `alignlab sweep"):
        load_run(path)
    with pytest.raises(UserError, match="describes a single run"):
        load_sweep("tiny")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["space.objectives.rb.weight={kind: int, low: 0, high: 1}"],
            "unknown key 'rb', valid: ra",
        ),
        (["space.optim.warmpu={kind: int, low: 0, high: 1}"], "did you mean 'warmup'?"),
        (["space.optim.warmup.low=-1"], "space.optim.warmup: -1 does not fit: optim.warmup: "),
        (["space.optim.warmup.low=3"], "space.optim.warmup: high: 2 is below low, 3"),
        (
            ["space.objectives.ra.weight={kind: float, low: 0, high: 1, step: 1.0e-300}"],
            "step: 1e-300 makes more than 1000000 values",
        ),
        (["space.objectives.ra.weight.low=0"], "a log space begins above 0"),
        (["space.objectives.ra.weight.step=0.1"], "step: nothing reads it with log: true"),
        (["space.optim.warmup.kind=integer"], "unknown value 'integer'"),
        (["space.objectives.ra.gate.choices=[none,t3]"], "t3 does not fit: objectives.ra.gate"),
        (["space.objectives.ra.gate.choices=[1,1.0]"], "1 and 1.0 are the same"),
        ([blocks(choose="range", last=4)], "block 4 does not exist"),
        (["space.objectives.ra.blocks.max_size=5"], "max_size: 5 is more than the 4 blocks"),
        (["space.objectives.ra.blocks.choose=single"], "max_size: nothing reads it with"),
        (["space.objectives.ra.blocks.max_size=null"], "max_size: missing; a subset needs it"),
        (
            ["objectives.ra.weight={gradient_share: 0.1}"],
            "space.objectives.ra.weight: the recipe has this weight measured, and numbers would "
            "take its place: search objectives.ra.weight.gradient_share",
        ),
        (
            ["space.objectives.ra.weight={}", searched("objectives.ra.weight.steps", 1, 2)],
            "space.objectives.ra.weight.steps: the recipe gives objectives.ra.weight as a number",
        ),
        ([searched("seed", 0, 1)], "space.seed: every trial trains with the sweep's `seeds`"),
        ([searched("name", "a", "b")], "space.name: changes no number of a trial"),
        ([searched("output", "a", "b")], "space.output: changes no number of a trial"),
        (
            [searched("tracking.log_every", 1, 2)],
            "space.tracking.log_every: changes no number of a trial",
        ),
        (
            [searched("checkpoint.every", 1, 2)],
            "space.checkpoint.every: changes no number of a trial",
        ),
        (
            [searched("data.cache.mode", "off", "read")],
            "space.data.cache.mode: changes no number of a trial",
        ),
        ([searched("data.val_clips", 4, 5)], "space.data.val_clips: trials would be measured diff"),
        ([searched("data.frames", 5, 9)], "space.data.frames: trials would be measured diff"),
        ([searched("data.seed", 0)], "space.data.seed: trials would be measured differently"),
        ([searched("eval.clips", 1, 2)], "space.eval.clips: trials would be measured differently"),
        ([searched("eval.blocks", [0], [1])], "space.eval.blocks: trials would be measured diff"),
        ([searched("teachers.dino.feature", "pre_norm", "post_norm")], "would be measured diff"),
        (
            [searched("flow.shift", 3.0, 5.0), "eval.sample_clips=1"],
            "space.flow.shift: trials would be measured differently (eval.sample_shift would "
            "differ), and their numbers could not be compared; remove it, and set "
            "eval.sample_shift for all trials alike",
        ),
        (
            [
                "teachers.late={family: dinov2, path: x, feature: post_norm}",
                searched("teachers.late.feature", "pre_norm", "post_norm"),
            ],
            "space.teachers.late.feature: no objective reads the teacher late",
        ),
        (["metric=retrieval/mean"], "unknown metric 'retrieval/mean', did you mean 'teacher_retr"),
        (["metric=cost/step"], "unknown metric 'cost/step', did you mean 'time/step'?"),
        (
            ["metric=gen/identity_proxy"],
            "metric: no generated clip is measured (eval.generated_clips); unknown metric 'gen/id",
        ),
        (
            ["metric=gen/confusion_proxy", "eval.generated_clips=1", "data.references=[1,1]"],
            "metric: gen/confusion_proxy needs two references; unknown metric",
        ),
        (
            ["metric=teacher_retrieval/mean", "eval.clips=1"],
            "metric: teacher_retrieval needs two clips; unknown metric",
        ),
        (
            ["metric={name: cknna/block9, direction: maximize}"],
            "did you mean 'cknna/block3'? valid: cknna/block0, cknna/block1, cknna/block2, ckn",
        ),
        (["metric={name: val/flow, direction: up}"], "direction: unknown value 'up', valid: min"),
        (["metric={name: val/flow, direction: maximize}"], "maximize would search for the worst"),
        (
            ["metric={name: gen_real/flicker, direction: maximize}", "eval.generated_clips=1"],
            "gen_real/flicker is of the real clips, no training changes it",
        ),
        (["constraints={val/flwo: 1}"], "constraints.val/flwo: unknown metric 'val/flwo', did you"),
        (["constraints={silhouette/mean: 1}"], "constraints.silhouette/mean: a constraint is the"),
        (["metric=val/flwo"], "unknown metric 'val/flwo', did you mean 'val/flow'?"),
        (["metric=cknna/mean"], "cknna/mean has no better side of its own"),
        (["metric=[val/flow,val/flow]"], "names a metric twice"),
        (["seeds=[0,0]"], "names a seed twice"),
        (["trials=null"], "trials: missing"),
        (["sampler=grid"], "trials: a grid has as many as it has points; remove trials"),
        (["sampler=grid", "trials=null"], "space.objectives.ra.weight: a grid needs a step"),
        (["sampler=cmaes"], "cmaes cannot choose among categories (space.objectives.ra.gate)"),
        (["sampler={name: random, startup: 3}"], "startup: nothing reads it with name: random"),
        (["pruner=median"], "median stops a trial between its seeds and needs at least 2 of them"),
        (["pruner=hyperband", "seeds=[0,1]"], "needs at least 3 of them, the recipe has 2"),
        (["pruner=wilcoxon", "seeds=[0,1,2,3]"], "needs at least 5 of them, the recipe has 4"),
        (
            ["pruner=median", "seeds=[0,1]", "metric=[val/flow,time/step]"],
            "trials with several metrics cannot be pruned",
        ),
    ],
)
def test_one_line_before_any_trial(
    make: MakeSweep, overrides: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_samplers, "NEEDS", {})
    with pytest.raises(UserError) as caught:
        config = make(*overrides)
        check(config)
        grid_points(config)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "accepted",
    [
        [searched("steps", 1, 2)],
        [searched("optim.lr", 1e-3, 1e-4)],
        [searched("flow.shift", 3.0, 5.0)],  # no clip is generated with it
        [searched("flow.shift", 3.0, 5.0), "eval.sample_clips=1", "eval.sample_shift=5"],
        [
            "teachers.late={family: dinov2, path: x, feature: post_norm}",
            searched("teachers.late.feature", "pre_norm", "post_norm"),
            searched("objectives.ra.teacher", "dino", "late"),
        ],
        ["metric=cross_cos/block3", "constraints={memory/peak_mib: 8000, time/step: 1}"],
        ["metric={name: cknna/mean, direction: maximize}"],
        ["metric=gen/identity_proxy", "eval.generated_clips=1"],
        ["metric={name: val/flow, direction: minimize}"],
    ],
)
def test_what_only_trains_is_searched_and_what_is_measured_optimised(
    make: MakeSweep, accepted: list[str]
) -> None:
    check(make(*accepted))


@pytest.mark.parametrize("sampler", ["gp", "cmaes"])
def test_a_missing_package_is_named(
    make: MakeSweep, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_samplers, "NEEDS", {sampler: ("no_such_package",)})
    with pytest.raises(UserError, match="pip install no_such_package"):
        check(make(f"sampler={sampler}"))


def test_values_replace_the_recipes(make: MakeSweep) -> None:
    base = make().base
    run = apply_values(base, {"objectives.ra.weight": 0.3, "objectives.ra.gate": "t^3"})
    assert run.objectives["ra"].weight == 0.3
    assert run.objectives["ra"].gate == PowerGate(kind="power", p=3.0)
    assert apply_values(base, {}) == base


def test_the_recipes_own_settings_are_a_point_of_the_space(make: MakeSweep) -> None:
    assert own_params(make()) == {
        "objectives.ra.weight": 1.0,
        "objectives.ra.blocks.pick1": 0,
        "objectives.ra.blocks.pick2": 2,
        "objectives.ra.gate": "none",
        "optim.warmup": 0,
    }
    assert own_params(make("objectives.ra.weight=20")) is None
    assert own_params(make(blocks(choose="range", last=3))) is None, "0 and 2 are no range"
    gate = "objectives.ra.gate={kind: window, low: 0.1, high: 0.5}"
    own = own_params(make(gate))
    assert own is not None and "window" in own["objectives.ra.gate"]


def drawn(config: SweepConfig, count: int = 60) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [suggest_values(study.ask(), config.space) for _ in range(count)]


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (blocks(choose="single", first=1, last=3), [[1], [2], [3]]),
        (
            blocks(choose="range", last=3, max_size=2),
            [[0], [1], [2], [3], [0, 1], [1, 2], [2, 3]],
        ),
        (
            blocks(choose="subset", first=1, last=3, max_size=2),
            [[1], [2], [3], [1, 2], [1, 3], [2, 3]],
        ),
    ],
)
def test_block_choices_are_all_valid_ones_and_no_other(
    make: MakeSweep, space: str, expected: list[list[int]]
) -> None:
    config = make(space)
    key = "objectives.ra.blocks"
    choices = [values[key] for values in drawn(config)]
    distinct = [choice for i, choice in enumerate(choices) if choice not in choices[:i]]
    assert sorted(distinct) == sorted(expected)
    one = make(space, "sampler=grid", "trials=null")
    only_blocks = one.model_copy(update={"space": {key: one.space[key]}})
    points = [value_of(key, one.space[key], params) for params in grid_points(only_blocks)]
    assert sorted(points) == sorted(expected), "a grid tries each once"


def test_a_grid_is_every_combination_with_the_own_first(make: MakeSweep) -> None:
    weight = "space.objectives.ra.weight={log: false, low: 0.5, high: 1.5, step: 0.25}"
    config = make(weight, "sampler=grid", "trials=null", "optim.warmup=1")
    points = grid_points(config)
    assert len(points) == 5 * 10 * 3 * 3
    assert points[0] == own_params(config)
    assert len({tuple(point.items()) for point in points}) == len(points)
    for point in points:
        for key, parameter in config.space.items():
            for name, distribution in distributions(key, parameter).items():
                assert distribution._contains(distribution.to_internal_repr(point[name]))


def test_every_block_that_may_be_aligned_is_measured(make: MakeSweep) -> None:
    assert tapped_blocks(make()) == (0, 1, 2, 3)
    assert tapped_blocks(make(blocks(choose="single", first=2, last=3))) == (0, 2, 3)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "nsga2"])
def test_a_trials_draw_depends_on_its_number_and_history(make: MakeSweep, sampler: str) -> None:
    config = make(f"sampler={sampler}")

    def draws(numbers: range) -> list[dict[str, Any]]:
        study = optuna.create_study()
        values = []
        for number in numbers:
            study.sampler = build_sampler(config.sampler, number)
            trial = study.ask()
            values.append(suggest_values(trial, config.space))
            study.tell(trial, float(number))
        return values

    first = draws(range(3))
    assert draws(range(3)) == first
    assert all(one != other for one, other in itertools.combinations(first, 2))
    assert draws(range(1, 2)) == first[1:2]


def test_cmaes_draws(make: MakeSweep) -> None:
    pytest.importorskip("cmaes", reason="pip install cmaes")
    config = make("sampler=cmaes")
    space = {k: v for k, v in config.space.items() if k != "objectives.ra.gate"}
    study = optuna.create_study()
    for number in range(4):
        study.sampler = build_sampler(config.sampler, number)
        trial = study.ask()
        weight = suggest_values(trial, space)["objectives.ra.weight"]
        study.tell(trial, weight)
    assert len({trial.params["objectives.ra.weight"] for trial in study.trials}) == 4


def test_a_grid_without_end_is_refused(make: MakeSweep) -> None:
    space = ("space={}", "space.optim.warmup={kind: int, low: 0, high: 1000000000000}")
    with pytest.raises(UserError, match="the grid has more than 100000 points"):
        grid_points(make(*space, "sampler=grid", "trials=null"))
