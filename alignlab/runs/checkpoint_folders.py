"""The folders `step-000500` of a run's checkpoints: which is whole, who reads it, which go.

Beside them are the copies `weights-000500` of weights alone.

Each has a `checksums.json` over its files. The newest that is whole is taken; of a newer one that
is damaged a line is said. What a reader holds (a shared lock, flock, on its `state.json`) is not
pruned meanwhile, so that a run can be looked at while it trains.
"""

import fcntl
import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from alignlab.errors import UserError, one_line
from alignlab.progress import warn_once
from alignlab.runs.atomic_files import remove_folder
from alignlab.runs.checksums import (
    DamagedError,
    damaged_files,
    read_checksums,
    read_json,
    write_json,
)
from alignlab.runs.metric_rows import LogMark

log = logging.getLogger(__name__)

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
OPTIMIZER_SHARDS = "optimizer"  # a folder, of a run whose transformer is in shards
SHARDS = "_shards"  # ends the name of a folder of likewise: transformer_shards, ema_shards
OPTIMIZER_STATE = (OPTIMIZER, OPTIMIZER_SHARDS)
LOG = "log.json"
WEIGHTS_ONLY = (
    "holds weights only (checkpoint.keep_finished: weights): training cannot go on from it, "
    "choose another name"
)
ASIDE = ".damaged"
# A training that keeps one checkpoint writes the next and removes the last: whoever lists the
# folder meanwhile may see neither, although there always is one.
LISTINGS = 3
_NAME = re.compile(r"step-\d{6,}")
_COPY = re.compile(r"weights-\d{6,}")


def step_folders(checkpoints: Path) -> list[Path]:
    """Oldest first; by number, since names of more than six digits do not sort.

    Whatever else lies there (`step-best`, `step-000012.damaged`, a file) is no checkpoint.
    """
    for _ in range(LISTINGS):
        found = [p for p in checkpoints.glob("step-*") if is_step_name(p.name) and p.is_dir()]
        if found:
            break
    return sorted(found, key=step_of)


def is_step_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint."""
    return _NAME.fullmatch(name) is not None


def has_weights_name(name: str) -> bool:
    """Whether a folder of this name has the weights of a step: a checkpoint or a copy of these."""
    return is_step_name(name) or is_copy_name(name)


def is_copy_name(name: str) -> bool:
    """Whether a folder of this name is a copy of weights."""
    return _COPY.fullmatch(name) is not None


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder, or of that of a copy of weights."""
    return int(checkpoint.name.rpartition("-")[2])


def step_path(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:06d}"


def copy_path(checkpoints: Path, step: int) -> Path:
    """Where the weights of a step lie that `checkpoint.weights_every` writes, beside checkpoints.

    They are what a checkpoint has but for the optimizer's state, and no training resumes from them.
    """
    return checkpoints / f"weights-{step:06d}"


def weight_copies(checkpoints: Path) -> list[Path]:
    """The copies of `checkpoint.weights_every`, oldest first."""
    found = [p for p in checkpoints.glob("weights-*") if is_copy_name(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def readable_folders(checkpoints: Path) -> list[Path]:
    """What has the weights of a step, oldest first: its checkpoint, or else a copy of weights."""
    found = {step_of(folder): folder for folder in weight_copies(checkpoints)}
    found |= {step_of(folder): folder for folder in step_folders(checkpoints)}
    return [found[step] for step in sorted(found)]


def latest(checkpoints: Path) -> Path | None:
    """The newest checkpoint of a run, whole or not, or None."""
    folders = step_folders(checkpoints)
    return folders[-1] if folders else None


def newest_step(checkpoints: Path) -> int:
    """Step of the newest checkpoint of a run, whole or not; 0 without one."""
    newest = latest(checkpoints)
    return 0 if newest is None else step_of(newest)


def no_checkpoint(checkpoints: Path) -> UserError:
    """Says why there is none: not yet, or no more."""
    run = checkpoints.parent
    if (run / "result.json").exists():
        return UserError(
            f"{run}: the run is finished, and its checkpoints were dropped "
            "(checkpoint.keep_finished): to have them, train it again under another name"
        )
    return UserError(f"{run}: the run has no checkpoint yet")


def prune(checkpoints: Path, keep: int, every: int | None = None) -> None:
    """Removes checkpoints that nobody reads at the moment.

    Args:
        checkpoints: the folder of all.
        keep: how many of the newest stay.
        every: those of steps that are multiples of it stay as well.
    """
    for old in step_folders(checkpoints)[:-keep]:
        if every is not None and step_of(old) % every == 0:
            continue
        with unread(old) as is_unread:
            if is_unread:
                remove_folder(old)


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a training can go on from a checkpoint; else it holds weights only."""
    return any((checkpoint / name).exists() for name in OPTIMIZER_STATE)


def problem(checkpoint: Path, *, leave_out: Collection[str] = ()) -> str | None:
    """What is damaged of a checkpoint, in words; None if it is whole.

    Reads all files. Of a checkpoint without checksums, which is older than these, only what a cut
    or missing file shows is seen.

    Args:
        checkpoint: its folder.
        leave_out: files, and folders of files, that are not read afterwards either.
    """
    try:
        expected = read_checksums(checkpoint)
        if expected is None:
            return _visible_problem(checkpoint, leave_out)
    except DamagedError as error:
        return f"{error.path.name}: {error.problem}"
    left = {
        name: digest
        for name, digest in expected.items()
        if name not in leave_out and name.split("/")[0] not in leave_out
    }
    broken = damaged_files(checkpoint, left)
    if not broken:
        return _log_problem(checkpoint) or _wrong_step(checkpoint)
    name, what = next(iter(broken.items()))
    more = f", and {len(broken) - 1} more files" if len(broken) > 1 else ""
    return f"{name}: {what}{more}"


class Resumable(NamedTuple):
    """The checkpoint that a training resumes from, and what was said of those that it cannot."""

    newest: Path | None
    notes: tuple[str, ...]


def resumable(checkpoints: Path) -> Resumable:
    """The newest whole checkpoint. Newer ones that are damaged are renamed, and that is said.

    Args:
        checkpoints: of a training of which this process holds the lock.

    Raises:
        UserError: there are checkpoints and all are damaged.
    """
    damaged: dict[Path, str] = {}
    newest = None
    for folder in reversed(step_folders(checkpoints)):
        found = problem(folder)
        if found is None:
            newest = folder
            break
        damaged[folder] = found
    if damaged and newest is None:
        raise _nothing_whole(damaged)
    for folder, found in damaged.items():
        assert newest is not None
        aside = folder.with_name(folder.name + ASIDE)
        log.warning(
            "%s is damaged (%s): resuming from the older %s; it is kept as %s until that step is "
            "reached again",
            *(folder, found, newest.name, aside.name),
        )
        remove_folder(aside)
        os.replace(folder, aside)
    # also those of an earlier start: no checkpoint was written since that could say it
    notes = [
        f"the checkpoint {aside.name.removesuffix(ASIDE)} was damaged: an older one was resumed"
        for aside in _asides(checkpoints)
    ]
    return Resumable(newest, tuple(notes))


def remove_replaced(checkpoints: Path, step: int) -> None:
    """Removes damaged checkpoints of a step that was reached again, and of earlier ones."""
    for aside in _asides(checkpoints):
        if step_of(aside.with_suffix("")) <= step:
            remove_folder(aside)


def _asides(checkpoints: Path) -> list[Path]:
    """Damaged checkpoints that were renamed."""
    found = sorted(checkpoints.glob(f"step-*{ASIDE}"))
    return [path for path in found if is_step_name(path.stem)]


@contextmanager
def reading(checkpoints: Path, step: int | None = None) -> Iterator[Path]:
    """A checkpoint whose weights are whole; until the end no training prunes it.

    The optimizer's state is not looked at.

    Args:
        checkpoints: of a run, which may be training.
        step: of the checkpoint; None: the newest that is whole.

    Raises:
        UserError: there is none.
    """
    with ExitStack() as stack:
        found = None
        while found is None:  # once more if it was pruned between being listed and being held
            found = _held(checkpoints, step, stack)
        yield found


def _held(checkpoints: Path, step: int | None, stack: ExitStack) -> Path | None:
    """None if a checkpoint went away meanwhile: there is a newer one then."""
    folders = [f for f in readable_folders(checkpoints) if step is None or step_of(f) == step]
    if not folders:
        if step is None or not readable_folders(checkpoints):
            raise no_checkpoint(checkpoints)
        raise UserError(f"{checkpoints.parent}: no checkpoint of step {step}")
    damaged: dict[Path, str] = {}
    for folder in reversed(folders):
        with ExitStack() as held:
            if not held.enter_context(hold(folder)):
                return None
            found = problem(folder, leave_out=OPTIMIZER_STATE)
            if found is None:
                for broken, what in damaged.items():
                    log.warning(
                        "%s is damaged (%s): the older %s is taken", broken, what, folder.name
                    )
                stack.push(held.pop_all())
                return folder
            if not folder.exists():
                return None
            damaged[folder] = found
    if step is not None:
        raise UserError(f"{folders[0]} is damaged ({damaged[folders[0]]}): name another checkpoint")
    raise _nothing_whole(damaged)


@contextmanager
def hold(checkpoint: Path) -> Iterator[bool]:
    """Holds a shared lock on a checkpoint, which keeps it there; gives False if it is gone."""
    try:
        number = os.open(checkpoint / STATE, os.O_RDONLY)
    except OSError:  # damaged, or gone
        yield checkpoint.exists()
        return
    try:
        _lock(number, fcntl.LOCK_SH)
        try:
            is_there = os.path.samestat(os.fstat(number), os.stat(checkpoint / STATE))
        except OSError:
            is_there = False
        yield is_there
    finally:
        os.close(number)


@contextmanager
def unread(checkpoint: Path) -> Iterator[bool]:
    """Whether nobody reads a checkpoint; until the end nobody begins to."""
    try:
        number = os.open(checkpoint / STATE, os.O_RDWR)  # on NFS a lock of one's own needs to write
    except OSError:
        yield True
        return
    try:
        yield _lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(number)


def _lock(number: int, how: int) -> bool:
    """False if another process has the lock; a filesystem without locks has none to wait for."""
    try:
        fcntl.flock(number, how)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _nothing_whole(damaged: dict[Path, str]) -> UserError:
    newest, found = next(iter(damaged.items()))
    run = newest.parent.parent
    older = len(damaged) - 1
    others = ("", ", as is the older one", f", as are the {older} older ones")[min(older, 2)]
    return UserError(
        f"{newest} is damaged ({found}){others}, and {newest.parent} holds no other checkpoint: "
        f"copy one back from elsewhere, or remove {run} to train from the start"
    )


def mark_checkpoint(checkpoint: Path, log: LogMark | None) -> None:
    """Writes into a checkpoint what the run's log holds with it; None: that is not known."""
    write_json(checkpoint / LOG, {} if log is None else asdict(log))


def log_mark(checkpoint: Path) -> LogMark | None:
    """What the run's log held when a checkpoint was written; None if that is not known.

    Raises:
        DamagedError: the file that says it is damaged.
    """
    path, fix = checkpoint / LOG, "remove the checkpoint's folder: an older one is then resumed"
    if not path.exists():
        return None
    mark = read_json(path, fix=fix)
    try:
        return LogMark(**mark) if mark else None
    except TypeError as error:
        raise DamagedError(path, one_line(error), fix) from error


def _log_problem(checkpoint: Path) -> str | None:
    if not (checkpoint / LOG).exists():
        return f"{LOG}: it is missing"
    try:
        log_mark(checkpoint)
    except DamagedError as error:
        return f"{LOG}: {error.problem}"
    return None


def _wrong_step(checkpoint: Path) -> str | None:
    """Of a folder that was renamed by hand."""
    step = json.loads((checkpoint / STATE).read_text())["step"]
    return None if step == step_of(checkpoint) else f"{STATE}: it holds step {step}"


def _visible_problem(checkpoint: Path, leave_out: Collection[str]) -> str | None:
    """Of an older checkpoint, without checksums."""
    warn_once(
        f"{checkpoint.parent}: has checkpoints from before checksums were kept: "
        "whether their bytes have changed is not known"
    )
    state = checkpoint / STATE
    if not state.is_file():
        return f"{STATE}: it is missing"
    try:
        step = json.loads(state.read_text())["step"]
    except (ValueError, KeyError, TypeError) as error:
        return f"{STATE}: {one_line(error) or 'it is empty'}"
    if not isinstance(step, int):
        return f"{STATE}: its step is {step!r}"
    if OPTIMIZER not in leave_out and not (checkpoint / OPTIMIZER).is_file():
        return f"{OPTIMIZER}: it is missing"
    for path in sorted(checkpoint.rglob("*.safetensors")):
        name = path.relative_to(checkpoint).as_posix()
        if name in leave_out:
            continue
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{name}: {one_line(error)}"
    return None if step == step_of(checkpoint) else f"{STATE}: it holds step {step}"
