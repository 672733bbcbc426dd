"""`alignlab tune` on a tiny model: sweeps, the comparison of the best, kills, and its report."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from alignlab import progress
from alignlab.errors import UserError
from alignlab.experiments.compare import outputs
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.launchers import local
from alignlab.experiments.run_table import GroupRow, runs_below
from alignlab.experiments.sweep import page
from alignlab.experiments.sweep.space import own_params
from alignlab.experiments.sweep.study import SweepStudy, sweep_folder
from alignlab.experiments.tune.plan import TunePlan, load_tune
from alignlab.experiments.tune.run import tune
from alignlab.recipe import load_run
from command_line import alignlab, refused
from kills import die_after, fork
from run_contents import read_table
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

Make = Callable[..., TunePlan]

VARIANTS = """
baseline: none
seeds: [0]
cost: null
variants:
  none: {}
  ra: {objectives.ra: {name: refalign, teacher: dino, blocks: [0]}}
  sync:
    objectives.sync: {name: layersync, blocks: [0], deep_blocks: [2]}
    optim.weight_decay: 0.02
tune:
  trials: 2
  sampler: {name: tpe, startup: 1}
  spaces:
    ra.objectives.ra.neg_weight: null
    sync: {objectives.sync.weight: {kind: categorical, choices: [0.2, 0.3]}}
"""
SWEPT = ("none", "ra", "sync")


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "tuned.yaml"
    return comparison_recipe(recipe_file, path, VARIANTS)


@pytest.fixture
def make(recipe: Path, tmp_path: Path) -> Make:
    return lambda *overrides: load_tune(recipe, [f"output={tmp_path}", *overrides])


def no_page(study: SweepStudy, best: object) -> Path:
    """Stands for the page of a sweep, which takes seconds and is not looked at here."""
    path = sweep_folder(study.config) / "sweep.html"
    path.write_text("")
    return path


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What the log said while `finished` was made, with a line for every step."""
    return []


@pytest.fixture(scope="module")
def finished(recipe: Path, lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> TunePlan:
    """A finished tuning and comparison; its folder is not to be changed."""
    plan = load_tune(recipe, [f"output={tmp_path_factory.mktemp('whole')}"])
    log, handler = logging.getLogger("alignlab"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_page", no_page)
        patch.setattr(progress, "LINE_EVERY_S", 0.0)
        patch.setattr(log, "level", logging.INFO)
        log.addHandler(handler)
        try:
            tune(plan)
        finally:
            log.removeHandler(handler)
    return plan


def comparison_of(plan: TunePlan) -> Comparison:
    return Comparison.load(plan.folder / "comparison.json")


def outcome(plan: TunePlan) -> dict[str, object]:
    """What a tuning found and what was compared, without times and places."""
    found: dict[str, object] = {}
    for variant in SWEPT:
        table = read_table(plan.folder / "tuning" / variant / "trials.csv")
        timed = ("time/", "memory/")
        found[variant] = [
            {key: cell for key, cell in row.items() if not key.startswith(timed)} for row in table
        ]
        best = load_run(plan.folder / "tuning" / variant / "best.yaml")
        found[f"best {variant}"] = (best.objectives, best.optim)
    comparison = comparison_of(plan)
    found["history"] = comparison.tuning["tuning.history"]
    found["flow"] = [(run.variant, run.seed, run.metrics["val/flow"]) for run in comparison.results]
    return found


def test_the_best_of_every_variant_is_compared_on_fresh_seeds(finished: TunePlan) -> None:
    comparison = comparison_of(finished)
    assert comparison.variants == SWEPT and comparison.seeds == (0,)
    assert comparison.tuning["tuning.trials"] == dict.fromkeys(SWEPT, 2)
    for variant in SWEPT:
        folder = finished.folder / "tuning" / variant
        rows = read_table(folder / "trials.csv")
        assert [row["state"] for row in rows] == ["complete", "complete"]
        assert {path.name for path in folder.glob("trial-*/*")} == {"seed-1000"}
        best, run = (
            load_run(path)
            for path in (folder / "best.yaml", finished.folder / variant / "seed-0/recipe.yaml")
        )
        assert (run.objectives, run.optim) == (best.objectives, best.optim)
        assert run.seed == 0
        trial = load_run(folder / "trial-0001/seed-1000/recipe.yaml")
        assert trial.eval.blocks == (0, 1, 2, 3), "all that any trial of any variant may align"
    assert (
        len({row["optim.lr"] for row in read_table(finished.folder / "tuning/none/trials.csv")})
        == 2
    )
    assert best.optim.weight_decay == 0.02
    again = load_compare(finished.folder / "compare.yaml")
    assert again.run("sync", 0) == run.model_copy(update={"eval": again.run("sync", 0).eval})


def test_the_report_says_what_each_sweep_searched_and_found(finished: TunePlan) -> None:
    comparison = comparison_of(finished)
    space = comparison.tuning["tuning.space"]["ra"]
    assert space == {
        "optim.lr": "0.0002 to 0.005 (log)",
        "objectives.ra.weight": "0.1 to 10 (log)",
        "objectives.ra.blocks": "one block, 0 to 1",
    }
    history = comparison.tuning["tuning.history"]["ra"]
    assert isinstance(history, list) and len(history) == 2
    markdown = (finished.folder / "report.md").read_text()
    page = (finished.folder / "report.html").read_text()
    for text in (markdown, page):
        assert "0.0002 to 0.005" in text and "one of 0.2000, 0.3000" in text
    assert "Best so far, by trial" in markdown and "- ra: " in markdown
    assert "<b>Tuning: " in page and "tuning.history" not in page
    assert list((finished.folder / "figures").glob("*-tuning-*.svg"))


def test_one_line_counts_the_steps_of_sweeps_and_comparison(
    finished: TunePlan, lines: list[str]
) -> None:
    assert (
        "tuned: 3 sweeps of 2 trials, 1 seed of 2 steps each (6 runs, 12 steps), then 3 runs of "
        "the best settings (6 steps): 9 runs, 18 steps in all"
    ) in lines
    shown = [line.removeprefix("tune tuned: ") for line in lines if line.startswith("tune tuned: ")]
    done = [int(line.split("/")[0]) for line in shown]
    assert done == sorted(done) and done[-1] == 18
    assert all(("/18, " in line and " left" in line) or "not known" in line for line in shown)
    assert any("tuning ra, trial 2 of 2, " in line for line in shown)
    assert any("comparing, 3 of 3 runs finished" in line for line in shown)
    others = [line for line in lines if line.startswith(("tuned: ", "tuned/"))]
    assert len(others) == 1, "nothing else counts steps"


def no_training(*_: object, **__: object) -> Path:
    raise AssertionError("trained again")


def test_what_is_finished_is_not_trained_again(
    finished: TunePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = outcome(finished)
    monkeypatch.setattr(outputs, "write_report", lambda comparison, folder: folder)
    monkeypatch.setattr(local, "train", no_training)
    monkeypatch.setattr(local, "train", no_training)
    tune(finished)
    assert outcome(finished) == before
    groups = [row for row in runs_below(finished.folder) if isinstance(row, GroupRow)]
    assert [(row.kind, row.state) for row in groups] == [
        ("comparison", "finished"),
        *[("sweep", "finished")] * 3,
    ]


def test_more_trials_than_were_compared_are_refused(finished: TunePlan, recipe: Path) -> None:
    output = finished.folder.parent
    line = refused("tune", recipe, f"output={output}", "--trials", 3)
    assert "the best of 2 trials of each variant are compared" in line
    assert "give --trials 2, or choose another name" in line


def killed_after(plan: TunePlan, end: str) -> None:
    """Tunes, and dies once the run whose name ends so is trained."""
    die_after(local, "train", lambda run, *_: run.name.endswith(end))
    tune(plan)


def test_a_killed_tuning_ends_as_one_that_was_not(
    make: Make, finished: TunePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the second sweep, and within the comparison."""
    monkeypatch.setattr(page, "write_page", no_page)
    monkeypatch.setattr(outputs, "write_report", lambda comparison, folder: folder)
    plan = make()
    for end in ("ra/trial-0000/seed-1000", "none/seed-0"):
        fork("tune", partial(killed_after, plan, end), dies=True)
        assert not (plan.folder / "comparison.json").exists()
    tune(plan)
    assert outcome(plan) == outcome(finished)


def test_a_dry_run_says_what_would_be_trained_and_makes_nothing(
    recipe: Path, tmp_path: Path
) -> None:
    done = alignlab("tune", recipe, f"output={tmp_path / 'out'}", "--dry", "tune.steps=1")
    assert done.exit_code == 0, done.output
    shown = done.stdout.splitlines()
    assert "none: optim.lr: 0.0002 to 0.005 (log)" in shown
    assert "sync: objectives.sync.deep_blocks: one block, 2 to 3" in shown
    assert not any("neg_weight" in line for line in shown), "null takes it out"
    assert shown[-1].startswith("tuned: 3 sweeps of 2 trials, 1 seed of 1 steps each (6 runs, 6 ")
    assert not (tmp_path / "out").exists()


def test_the_printed_recipe_is_the_same_again(recipe: Path, tmp_path: Path) -> None:
    printed = alignlab("tune", recipe, "--print-config", "--trials", 5)
    (tmp_path / "again.yaml").write_text(printed.stdout)
    assert "# variant none searches:" in printed.stdout
    first, again = load_tune(recipe, trials=5), load_tune(tmp_path / "again.yaml")
    assert again.config == first.config and again.tune.trials == 5
    assert {v: s.space for v, s in again.sweeps.items()} == {
        v: s.space for v, s in first.sweeps.items()
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tune.seeds=[0, 7]"], "tune.seeds: 0 would be trained with in the comparison as well"),
        (
            ["tune.trials=null"],
            "tune.trials: missing; say how many with --trials N or tune.trials=N",
        ),
        (["tune.trials=0"], "tune.trials: "),
        (["tune.sampler=grid"], "tune.sampler: a grid has as many trials as points"),
        (["tune.metric=val/flaw"], "tune.metric: unknown metric 'val/flaw'"),
        (["tune.space.optim.lr=null"], "tune.spaces.none: nothing is left to search"),
        (
            ["tune.spaces.raa.optim.lr={kind: float, low: 0.1, high: 0.2}"],
            "tune.spaces.raa.optim.lr: unknown variant 'raa'",
        ),
        (
            ["tune.spaces.sync.objectives.sync.weigth={kind: float, low: 0.1, high: 0.2}"],
            "tune.spaces.sync.objectives.sync.weigth: unknown key 'weigth'",
        ),
        (
            ["variants.sync.objectives.sync.deep_blocks=[1]"],
            "tune.spaces.sync.objectives.sync.blocks: [1] does not fit: ",
        ),
        (["variants.ra={from: runs/ra/best.yaml}"], "variants.ra.from: "),
        (
            ["variants.tuning={}"],
            "variants.tuning: the sweeps lie in tuning: choose another name",
        ),
        (["variants.ra.eval.clips=1"], "eval.clips: variants are measured differently"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_line(
    recipe: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    line = refused("tune", recipe, f"output={tmp_path / 'out'}", *overrides)
    assert line.startswith(f"error: {said}"), line
    assert not (tmp_path / "out").exists()


def test_a_measured_weight_is_searched_by_its_share(make: Make) -> None:
    measured = "variants.ra.objectives.ra.weight={gradient_share: 0.2}"
    (ra, plain) = (make(measured).sweeps["ra"], make().sweeps["ra"])
    assert "objectives.ra.weight" in plain.space and "objectives.ra.weight" not in ra.space
    share = ra.space["objectives.ra.weight.gradient_share"].model_dump()
    assert (share["low"], share["high"], share["log"]) == (0.01, 1.0, True)
    assert own_params(ra) is not None
    left_out = make(measured, "tune.spaces.ra.objectives.ra.weight=null").sweeps["ra"]
    assert not any(key.startswith("objectives.ra.weight") for key in left_out.space)
    number = "tune.spaces.ra.objectives.ra.weight={kind: float, low: 0.1, high: 0.2}"
    with pytest.raises(
        UserError, match=r"^tune\.spaces\.ra\.objectives\.ra\.weight: the recipe has"
    ):
        make(measured, number)


def test_a_recipe_with_tune_is_for_tune_alone(recipe: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path}"
    assert "use `alignlab tune`" in refused("compare", recipe, output)
    assert f"use `alignlab tune {recipe}`" in refused("train", recipe, output)
    assert load_compare(recipe, ["tune=null"]).tune is None
    single = refused("tune", "tiny", "--trials", 1)
    assert "describes a single run" in single and "use `alignlab train tiny`" in single


def test_an_older_recipe_needs_no_section(recipe: Path) -> None:
    plan = load_tune(recipe, ["tune=null"], trials=4)
    assert plan.tune.seeds == (1000,) and plan.sweeps["none"].trials == 4
    assert json.loads(plan.sweeps["ra"].model_dump_json())["base"]["eval"]["blocks"] == [0, 1, 2, 3]


def test_the_shipped_recipe_is_of_the_size_that_it_says() -> None:
    plan = load_tune("tune_from_scratch")
    assert list(plan.sweeps) == ["none", "refalign", "repa", "videorepa", "sara", "layersync"]
    assert plan.tuning_steps + plan.compared_steps == 16_800  # 40 minutes at 7 steps a second
    assert "66 runs, 16,800 steps in all" in plan.sentence
    for variant, sweep in plan.sweeps.items():
        assert own_params(sweep) is not None, f"{variant}: its own values are the first trial"
        assert sweep.space["optim.lr"] == plan.sweeps["none"].space["optim.lr"]
