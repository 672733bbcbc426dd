"""Who works on a trial, and whether that process still lives.

A lease is an attribute of the trial: its holder counts beats, and another process takes it for
dead when the count stands still by its own clock, or at once when it can see that it has ended.

Why not Optuna's heartbeat, retry callback and MaxTrialsCallback (tried with Optuna 5.0):

- A stale trial becomes FAIL for good (setting WAITING raises UpdateFinishedTrialError), and its
  retry gets the next free number: of 3 planned trials the first then is number 3. Folder, row in
  `trials.csv`, MLflow run and random seed all go by the number, so a killed sweep would differ from
  one that was not.
- A process killed between the two steps of a retry loses the trial (2 planned trials: one FAIL,
  one WAITING); a worker killed before its first beat leaves a trial RUNNING for ever.
- Journal files have no heartbeat, and they are what several machines without a server share.
- MaxTrialsCallback counts afterwards: asked for 10, 4 workers finished 13.
- Popping waiting trials from SQLite without a lock of our own (`SweepStudy.claim`): 4 processes
  took 6 to 10 of 40 trials twice.
"""

import _thread
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

BEAT_S = 10.0
GRACE_S = 90.0
LEASE = "lease"
ENDED = "ended"
# Not SIGINT: that is ignored in processes that a script started in the background.
LOST_SIGNAL = signal.SIGUSR2


class Lease:
    """A claim on a trial.

    If another process takes the trial over (this one was suspended for longer than the grace
    time), `lost` becomes true and the main thread gets a KeyboardInterrupt.
    """

    def __init__(self, storage: BaseStorage, trial_id: int) -> None:
        self.lost = False
        self._storage = storage
        self._trial_id = trial_id
        self.claim: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "place": _place(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "host": platform.node(),
            "beat": 0,
        }
        self._renew()

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renews the claim every `BEAT_S` seconds for a while; for the main thread."""
        stop = threading.Event()
        thread = threading.Thread(target=self._renew_until, args=(stop,), daemon=True)
        handler = signal.signal(LOST_SIGNAL, signal.default_int_handler)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            signal.signal(LOST_SIGNAL, handler)

    def is_held(self) -> bool:
        """Whether the trial is this process's, running or finished by it."""
        trial = self._storage.get_trial(self._trial_id)
        claim = trial.user_attrs.get(LEASE) or {}
        return trial.state != TrialState.WAITING and claim.get("owner") == self.claim["owner"]

    def _renew(self) -> None:
        claim = self.claim | {"beat": self.claim["beat"] + 1}
        self._storage.set_trial_user_attr(self._trial_id, LEASE, claim)
        self.claim = claim

    def _renew_until(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT_S):
            try:
                if not self.is_held():
                    self.lost = True
                    _thread.interrupt_main(LOST_SIGNAL)
                    return
                self._renew()
            except UpdateFinishedTrialError:
                return
            except StorageInternalError:
                continue  # the storage is busy or away; the next beat may get through


class Watch:
    """Tells which running trials nobody works on any more, and on which somebody does."""

    def __init__(self) -> None:
        self._last_beats: dict[int, tuple[Any, float]] = {}
        self._beating: set[str] = set()  # owners

    def is_alive(self, trial: FrozenTrial) -> bool:
        """Whether the holder's process is seen here, or gave a beat while this watched."""
        claim = trial.user_attrs.get(LEASE)
        if claim is None:
            return False
        return claim["owner"] in self._beating or (claim["place"] == _place() and _lives(claim))

    def is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the holder is known to have ended, or gave no beat for `GRACE_S` seconds."""
        claim = trial.user_attrs.get(LEASE)
        if claim is not None and claim["place"] == _place() and not _lives(claim):
            return True
        beat = claim and (claim["owner"], claim["beat"])
        last_beat, since = self._last_beats.get(trial.number, (None, None))
        if since is None or beat != last_beat:
            if claim and last_beat and last_beat[0] == claim["owner"]:
                self._beating.add(claim["owner"])
            self._last_beats[trial.number] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > GRACE_S


def machine() -> str:
    """The same for all processes under one kernel, also in containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else str(uuid.getnode())


def _place() -> str:
    """Where process numbers mean what they mean here; elsewhere than on Linux, nowhere else."""
    namespace = Path("/proc/self/ns/pid")
    return f"{machine()} {os.readlink(namespace) if namespace.exists() else os.getpid()}"


def _lives(claim: dict[str, Any]) -> bool:
    """Whether the process that made a claim, here, has not ended."""
    pid = claim["pid"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    started, now = claim.get("started"), _started(pid)
    if started is not None and now is not None and started != now:
        return False  # another process, under its number
    return now != ENDED


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; `ENDED`, or None where that is not known.

    A killed process whose parent has not looked yet has ended.
    """
    if not Path("/proc/self/stat").exists():
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return ENDED
    return ENDED if fields[0] == "Z" else fields[19]
