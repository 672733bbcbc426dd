"""A sweep's folder as data: the trials of trials.csv, by seed, and the best."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from alignlab.errors import UserError
from alignlab.experiments import load_sweep
from alignlab.experiments.sweep.config import load_sweep as load_recipe
from alignlab.experiments.sweep.run import sweep
from alignlab.recipe import load_run
from run_contents import table_frame
from small_recipes import sweep_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

SWEEP = """
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
  objectives.ra.blocks: {kind: blocks, choose: subset, last: 3, max_size: 2}
metric: val/flow
trials: 3
seeds: [4, 7]
sampler: random
"""


@pytest.fixture(scope="module")
def folder(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of three trials over two seeds."""
    recipe = sweep_recipe(recipe_file, tmp_path_factory.mktemp("sweep") / "sweep.yaml", SWEEP)
    output = tmp_path_factory.mktemp("sweeps")
    return sweep(load_recipe(recipe, [f"output={output}"])).parent


def test_the_trials_are_those_of_the_table(folder: Path) -> None:
    frame, table = (
        load_sweep(folder).to_frame(),
        table_frame(folder / "trials.csv"),
    )
    assert list(frame.columns) == [*table.columns, "num_seeds"]
    assert frame["state"].tolist() == ["complete"] * 3 == table["state"].tolist()
    for name in ("trial", "objectives.ra.weight", "val/flow", "cknna/mean", "folder"):
        assert frame[name].tolist() == table[name].tolist()
    assert frame["feasible"].all() and frame["num_seeds"].tolist() == [2, 2, 2]
    blocks = frame["objectives.ra.blocks"]
    assert [str(value) for value in blocks] == table["objectives.ra.blocks"].tolist()
    assert all(isinstance(value, list | tuple) for value in blocks)


def test_numbers_by_seed_average_to_those_of_the_trial(folder: Path) -> None:
    data = load_sweep(folder)
    seeds = data.seeds_frame()
    assert set(seeds["seed"]) == {4, 7}
    assert not seeds.duplicated(["trial", "seed", "metric"]).any()
    means = seeds[seeds["metric"] == "val/flow"].groupby("trial")["value"].mean()
    assert means.tolist() == pytest.approx(data.to_frame()["val/flow"].tolist())


def test_the_best_is_that_of_best_yaml(folder: Path) -> None:
    data = load_sweep(folder)
    best, run = data.best, load_run(folder / "best.yaml", stored=True)
    assert best is not None
    frame = data.to_frame()
    assert best.metrics["val/flow"] == frame["val/flow"].min()
    assert best.number == frame["val/flow"].idxmin()
    ra = run.objectives["ra"]
    assert best.values["objectives.ra.weight"] == ra.weight
    assert tuple(best.values["objectives.ra.blocks"]) == ra.blocks
    assert data.pareto == [best.number]


def test_a_sweep_that_was_moved_is_read_where_it_is(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "renamed"
    shutil.copytree(folder, moved)
    before = sorted(moved.rglob("*"))
    pd.testing.assert_frame_equal(load_sweep(moved).to_frame(), load_sweep(folder).to_frame())
    assert sorted(moved.rglob("*")) == before
    (moved / "study.db").unlink()
    with pytest.raises(UserError, match=r"no study 'sweep' in .*renamed/study\.db: its trials"):
        load_sweep(moved)
    assert not (moved / "study.db").exists()


def test_what_is_no_sweep_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder; .*sweep\.config\.load_sweep reads"):
        load_sweep("sweep_refalign")
    with pytest.raises(UserError, match="no sweep there"):
        load_sweep(tmp_path)
    with pytest.raises(UserError, match=r"holds a run: alignlab\.experiments\.load_run reads it"):
        load_sweep(next(folder.glob("trial-*/seed-*")))
