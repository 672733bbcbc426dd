"""The study of a sweep: claims and leases, who is dead, which storage."""

import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from alignlab import interruption
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers import local
from alignlab.experiments.sweep import lease as sweep_lease
from alignlab.experiments.sweep.config import SweepConfig, dump_sweep, load_sweep
from alignlab.experiments.sweep.lease import GRACE_S, LEASE, Watch
from alignlab.experiments.sweep.run import sweep
from alignlab.experiments.sweep.study import (
    RECIPE_HASH,
    SweepStudy,
    create_study,
    join_study,
    shown_url,
)
from alignlab.train import train
from small_recipes import sweep_recipe

MakeSweep = Callable[..., SweepConfig]

SWEEP = """
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
metric: val/flow
trials: 3
"""


@pytest.fixture
def make(recipe_file: Path, tmp_path: Path) -> MakeSweep:
    path = sweep_recipe(recipe_file, tmp_path / "sweep.yaml", SWEEP)
    return lambda *overrides: load_sweep(path, [f"output={tmp_path}", *overrides])


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_a_silent_holder_loses_its_trial_and_a_living_one_does_not(
    make: MakeSweep, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen from another machine, where the holder's process cannot be looked at."""
    now = 0.0
    monkeypatch.setattr(sweep_lease, "BEAT_S", 0.05)
    monkeypatch.setattr(sweep_lease, "time", SimpleNamespace(monotonic=lambda: now))
    config = make(*([f"storage={tmp_path}/study.log"] if storage == "journal" else []))
    mine, other = create_study(config), join_study(config)
    claimed = mine.claim()
    assert claimed is not None
    trial, lease = claimed
    second = other.claim()
    assert second is not None and (trial.number, second[0].number) == (0, 1)
    monkeypatch.setattr(sweep_lease, "_place", lambda: "elsewhere")
    with lease.renewed():  # the second one gives no beat
        assert other.put_back_dead() == []
        now += GRACE_S - 1
        assert other.put_back_dead() == []
        for dead in ([1], []):
            wait_for_beat(other)
            now += GRACE_S
            assert other.put_back_dead() == dead
        assert lease.is_held()
    assert other.put_back_dead() == []
    now += GRACE_S + 1
    assert other.put_back_dead() == [0]
    assert not lease.is_held()
    again = other.claim()
    assert again is not None and again[0].number == 0
    assert other.put_back_dead() == [], "the old one's silence does not count against a new holder"


def wait_for_beat(study: SweepStudy) -> None:
    """Until the holder of the first trial gives a sign of life."""
    before, end = study.trials()[0].user_attrs[LEASE]["beat"], time.monotonic() + 300
    while study.trials()[0].user_attrs[LEASE]["beat"] == before:
        assert time.monotonic() < end, "no beat"
        time.sleep(0.01)


def test_a_suspended_worker_lets_go_when_it_wakes(
    make: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_lease, "BEAT_S", 0.05)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in `nohup alignlab sweep ... &`
    try:
        study = create_study(make())
        claimed = study.claim()
        assert claimed is not None
        trial, lease = claimed
        study.put_back(trial.number, lease.claim)  # what another worker does
        end = time.monotonic() + 300
        with pytest.raises(KeyboardInterrupt), lease.renewed():
            while time.monotonic() < end:
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)
    assert lease.lost and signal.getsignal(sweep_lease.LOST_SIGNAL) == signal.SIG_DFL


def test_sigterm_puts_the_trial_back(make: MakeSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*_: object, **__: object) -> Path:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")

    monkeypatch.setattr(local, "train", terminated)
    config = make()
    with interruption.handled(), pytest.raises(KeyboardInterrupt):
        sweep(config)
    assert {t.state for t in join_study(config).trials()} == {TrialState.WAITING}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_a_sweep_that_kept_no_step_gives_way_to_another_recipe(
    make: MakeSweep, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = [f"storage={tmp_path}/study.log"] if storage == "journal" else []
    study = create_study(make(*at))
    assert study.claim() is not None
    with pytest.raises(UserError, match="of another recipe"):
        create_study(make(*at, "optim.lr=1e-4"))  # its worker lives
    monkeypatch.setattr(sweep_lease, "_lives", lambda pid: False)
    begun = tmp_path / "sweep" / "trial-0000" / "seed-0"
    (begun / "checkpoints" / "step-000001").mkdir(parents=True)
    (begun / "recipe.yaml").touch()
    with pytest.raises(UserError, match="of another recipe"):
        create_study(make(*at, "optim.lr=1e-4"))
    (begun / "checkpoints" / "step-000001").rmdir()
    other = create_study(make(*at, "optim.lr=1e-4", "trials=2"))
    assert [trial.state for trial in other.trials()] == [TrialState.WAITING] * 2
    join_study(make(*at, "optim.lr=1e-4", "trials=2"))


def test_a_full_disk_under_the_study_is_named(
    make: MakeSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        cause = OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
        raise StorageInternalError("An exception is raised during the commit.") from cause

    monkeypatch.setattr(local, "train", full)
    with pytest.raises(OSError, match="No space left") as caught:
        sweep(make())
    assert caught.value.filename == str(tmp_path / "sweep" / "study.db")


def test_claims_never_collide(make: MakeSweep) -> None:
    config = make("trials=24")
    create_study(config)
    numbers: list[int] = []

    def claim_all() -> None:
        study = join_study(config)
        while (claimed := study.claim()) is not None:
            numbers.append(claimed[0].number)

    threads = [threading.Thread(target=claim_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(24))


def test_a_password_is_not_shown(make: MakeSweep) -> None:
    config = make("storage=postgresql://me:secret@host/db")
    assert shown_url(config) == "postgresql://me:***@host/db"


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        ("study.txt", "neither a URL nor a journal file"),
        ("nosuch://x/y", "nosuch"),
        ("sqlite:////nowhere/study.db", "unable to open database file"),
    ],
)
def test_a_bad_storage_is_one_line(make: MakeSweep, storage: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        sweep(make(f"storage={storage}"))
    assert "\n" not in str(caught.value)


def test_a_dead_process_is_seen_at_once(make: MakeSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    study = create_study(make())
    claimed = study.claim()
    assert claimed is not None
    (trial,) = study.trials(TrialState.RUNNING)
    assert not Watch().is_dead(trial)
    monkeypatch.setattr(sweep_lease, "_lives", lambda pid: False)
    assert Watch().is_dead(trial)


def test_the_trial_of_a_dead_worker_comes_before_those_that_wait(
    make: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the samplers that learn see what they would have seen."""
    trained: list[str] = []

    def recorded(run: RunConfig, **options: Any) -> Path:
        trained.append(run.name)
        return train(run, **options)

    monkeypatch.setattr(local, "train", recorded)
    assert create_study(make()).claim() is not None
    monkeypatch.setattr(sweep_lease, "_lives", lambda pid: False)
    sweep(make())
    assert trained == [f"sweep/trial-{number:04d}/seed-0" for number in range(3)]


def test_a_sweep_that_counted_clips_goes_on(make: MakeSweep, tmp_path: Path) -> None:
    config = make()
    study = create_study(config).study
    study.set_user_attr(RECIPE_HASH, "v2-0123456789ab")
    stored = tmp_path / "sweep" / "recipe.yaml"
    stored.write_text(dump_sweep(config).replace("data:\n", "data:\n  cache_clips: 7\n"))
    with pytest.raises(UserError, match="of another recipe"):
        join_study(make("optim.lr=1e-4"))
    assert join_study(config).size == 3
    create_study(config)
    stored.write_text(dump_sweep(config))  # as the command does next
    assert join_study(config).size == 3
