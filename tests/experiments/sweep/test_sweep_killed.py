"""A sweep that is killed at any write to its study ends with the trials of one that is not.

`ALIGNLAB_KILLS=1000 pytest ...` kills at so many writes, or at every one if there are fewer.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import BaseStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState

from alignlab.config.run import RunConfig
from alignlab.evaluation.intermediate import OnEvaluation
from alignlab.experiments.launchers import local
from alignlab.experiments.sweep import lease as sweep_lease
from alignlab.experiments.sweep import run as sweep_run
from alignlab.experiments.sweep import trial as sweep_trial
from alignlab.experiments.sweep import worker as sweep_worker
from alignlab.experiments.sweep.config import SweepConfig, load_sweep
from alignlab.experiments.sweep.run import sweep
from alignlab.experiments.sweep.study import create_study, join_study
from alignlab.runs.run_folder import RunFolder
from kills import die, fork
from small_recipes import sweep_recipe

KILLS = int(os.environ.get("ALIGNLAB_KILLS", "0"))
SWEEP = """
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
  objectives.ra.blocks: {kind: blocks, choose: range, last: 3}
  optim.lr: {kind: float, low: 1.0e-4, high: 1.0e-2, log: true}
metric: val/flow
trials: 6
"""
GRID = """
space:
  objectives.ra.weight: {kind: float, low: 1.0, high: 2.0, step: 0.5}
  optim.lr: {kind: categorical, choices: [1.0e-3, 2.0e-3]}
metric: val/flow
"""
SAMPLERS = {
    "tpe": "{name: tpe, startup: 2}",
    "tpe, hyperband": "{name: tpe, startup: 2}",
    "gp": "{name: gp, startup: 2}",
    "cmaes": "{name: cmaes, population: 3}",
    "nsga2": "{name: nsga2, population: 3}",
    "random": "random",
    "grid": "grid",
}
WRITES = [name for name in dir(BaseStorage) if name.startswith(("set_", "create_new_"))]


def trained_at_once(
    run: RunConfig, *, on_evaluation: OnEvaluation | None = None, **_: object
) -> Path:
    """Stands for `train`: a number that depends on the settings, without the training."""
    folder = RunFolder.create(run)
    weight, blocks = run.objectives["ra"].weight, run.objectives["ra"].blocks
    assert isinstance(weight, float)
    flow = (weight - 2) ** 2 + 100 * run.optim.lr + len(blocks) / (1 + run.seed)
    (folder.path / "environment.json").write_text(
        json.dumps({"device": "cpu", "threads": 1, "torch": "-", "commit": "-"})
    )
    every = run.eval.every or run.steps
    for step in range(every, run.steps, every):
        if on_evaluation is not None:
            on_evaluation(step, {"val/flow": flow + blocks[0] + 9 / step})
    metrics = {"val/flow": flow + blocks[0]}
    folder.result.write_text(json.dumps({"steps": run.steps, "metrics": metrics}))
    return folder.path


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "train", trained_at_once)
    monkeypatch.setattr(sweep_run, "write_results", lambda study: Path())
    monkeypatch.setattr(sweep_lease, "GRACE_S", 0.2)
    monkeypatch.setattr(sweep_worker, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(sweep_trial, "LOOK_EVERY_S", 0.05)


@contextmanager
def counted_writes(kill_after: int | None = None) -> Iterator[list[str]]:
    """The writes to studies; the process dies after one of them."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            write = getattr(_CachedStorage, name)
            patch.setattr(_CachedStorage, name, _counting(write, seen, kill_after))
        yield seen


def _counting(method: Any, seen: list[str], kill_after: int | None) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        seen.append(method.__name__)
        if len(seen) == kill_after:
            die()
        return result

    return counted


@pytest.mark.parametrize("lives", [False, True])
def test_no_trial_is_drawn_before_a_sign_of_life_of_a_worker_elsewhere(
    lives: bool, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker on another machine may be dead: then its trial comes first."""
    path = sweep_recipe(recipe_file, tmp_path / "sweep.yaml", SWEEP)
    config = load_sweep(path, [f"output={tmp_path}"])
    claimed = create_study(config).claim()
    assert claimed is not None
    monkeypatch.setattr(sweep_lease, "_place", lambda: "elsewhere")
    monkeypatch.setattr(sweep_lease, "BEAT_S", 0.05 if lives else 1000)
    with claimed[1].renewed():
        study = join_study(config)
        assert not study.is_settled()
        while not study.is_settled():
            time.sleep(0.02)
        following = study.claim()
    assert following is not None and following[0].number == (1 if lives else 0)


def killed_sweep(config: SweepConfig, moment: int) -> None:
    with counted_writes(kill_after=moment):
        sweep(config)


def trials_of(config: SweepConfig) -> list[tuple[Any, ...]]:
    return [
        (t.number, t.state, t.params, t.values, t.intermediate_values)
        for t in join_study(config).trials()
    ]


def moments_of(writes: list[str]) -> list[int]:
    """After which writes the sweep is killed: spread, or between two params of the last trial."""
    if KILLS:
        return list(range(1, len(writes) + 1, max(1, len(writes) // KILLS)))
    last = len(writes) - writes[::-1].index("set_trial_param")
    return [last - 1]


@pytest.mark.parametrize("sampler", SAMPLERS if KILLS else ["tpe, hyperband", "gp"])
def test_a_kill_at_a_write_changes_no_trial(
    sampler: str, recipe_file: Path, tmp_path: Path
) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes", reason="pip install cmaes")
    text = GRID if sampler == "grid" else SWEEP
    path = sweep_recipe(recipe_file, tmp_path / "sweep.yaml", text)

    def configured(folder: str) -> SweepConfig:
        overrides = [f"output={tmp_path / folder}", f"sampler={SAMPLERS[sampler]}"]
        if "hyperband" in sampler:
            overrides += ["pruner={name: hyperband, reduction: 2}", "steps=8", "eval.every=2"]
            overrides += ["trials=12"]
        return load_sweep(path, overrides)

    with counted_writes() as writes:
        sweep(configured("whole"))
    expected = trials_of(configured("whole"))
    if "hyperband" in sampler:
        states = [state for _, state, *_ in expected]
        assert TrialState.PRUNED in states and TrialState.COMPLETE in states
    wrong, moments = [], moments_of(writes)
    for moment in moments:
        config = configured(f"killed-{moment}")
        fork("sweep", partial(killed_sweep, config, moment), dies=True)
        sweep(config)
        if trials_of(config) != expected:
            wrong.append((moment, writes[moment - 4 : moment + 1]))
    assert not wrong, f"{len(wrong)} of {len(moments)}"
