"""What is left of checkpoints: weights alone, and of a finished run what `keep_finished` says.

Those of a finished run are dropped once the result is there. What a kill in between left, or
somebody was reading, is dropped by the next command that finds the run finished.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from alignlab.config.parts import TrainingConfig
from alignlab.errors import UserError
from alignlab.runs.atomic_files import remove_folder, whole_folder
from alignlab.runs.checkpoint_folders import (
    LOG,
    OPTIMIZER_STATE,
    copy_path,
    has_optimizer,
    mark_checkpoint,
    readable_folders,
    step_folders,
    step_of,
    unread,
    weight_copies,
)
from alignlab.runs.checksums import (
    CHECKSUMS,
    files_below,
    read_checksums,
    write_checksums,
    write_json,
)
from alignlab.runs.file_lock import NOTE_EVERY_S
from alignlab.runs.run_folder import RunFolder, only_writer

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2  # whether a copy is read


def keep_weights_of(checkpoint: Path) -> None:
    """Writes the copy of a checkpoint's weights, which stays when the checkpoint goes.

    Nothing is shared with the checkpoint: what damages one of the two leaves the other.
    """
    digests = read_checksums(checkpoint)  # None of what an older alignlab wrote
    kept = _without_optimizer(files_below(checkpoint) if digests is None else digests)
    with whole_folder(copy_path(checkpoint.parent, step_of(checkpoint))) as folder:
        for name in kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, folder / name)
        if digests is None:
            write_checksums(folder)
        else:
            write_json(folder / CHECKSUMS, {"files": {name: digests[name] for name in kept}})
        mark_checkpoint(folder, None)


def make_up_for_copy(newest: Path, config: TrainingConfig) -> None:
    """Writes the copy of the weights that a kill has prevented, while their checkpoint is there."""
    every, step = config.checkpoint.weights_every, step_of(newest)
    if every is not None and step % every == 0 and not copy_path(newest.parent, step).exists():
        keep_weights_of(newest)


def drop_later_copies(checkpoints: Path, newest: Path | None) -> None:
    """Drops copies of weights of steps that a training takes again, which resumes from `newest`.

    Whoever reads one is waited for, and that is said: else it would find others in their place.
    """
    done = 0 if newest is None else step_of(newest)
    for copy in weight_copies(checkpoints):
        if step_of(copy) > done:
            _drop_when_unread(copy)


def drop_checkpoints(folder: RunFolder, config: TrainingConfig) -> None:
    """Drops what is not to be kept of a finished run; what somebody reads stays for now.

    Args:
        folder: of the run; this process holds its lock.
        config: its recipe.
    """
    keep, checkpoints = config.checkpoint.keep_finished, step_folders(folder.checkpoints)
    if keep == "all" or not folder.is_finished_at(config.steps):
        return
    every = config.checkpoint.keep_every
    for checkpoint in checkpoints:
        is_kept = every is not None and step_of(checkpoint) % every == 0
        is_slimmed = keep == "weights" and (is_kept or checkpoint == checkpoints[-1])
        _drop_unread(checkpoint, _drop_optimizer if is_slimmed else remove_folder)
    for copy in weight_copies(folder.checkpoints) if keep == "none" else ():
        _drop_unread(copy, remove_folder)


def drop_if_unread(folder: RunFolder, config: TrainingConfig) -> None:
    """Drops what a kill has left, unless another process works in the folder."""
    if config.checkpoint.keep_finished == "all" or not readable_folders(folder.checkpoints):
        return
    with _writer(folder) as is_writer:
        if is_writer:
            drop_checkpoints(folder, config)


def drop_pruned(folder: RunFolder, config: TrainingConfig) -> None:
    """Drops the checkpoints of a run that ends before its last step, and will not go on.

    Training cannot go on from weights alone, nor are they those of a finished run: none is kept.
    """
    if config.checkpoint.keep_finished == "all":
        return
    with _writer(folder) as is_writer:
        if not is_writer:
            return
        for kept in (*step_folders(folder.checkpoints), *weight_copies(folder.checkpoints)):
            _drop_unread(kept, remove_folder)


@contextmanager
def _writer(folder: RunFolder) -> Iterator[bool]:
    """Holds the lock of a folder; false, and said, if another process does."""
    with ExitStack() as lock:
        try:
            lock.enter_context(only_writer(folder.path, wait=False))
        except UserError as error:
            log.warning("its checkpoints are kept for now: %s", error)
            yield False
            return
        yield True


def _drop_unread(checkpoint: Path, drop: Callable[[Path], None]) -> None:
    with unread(checkpoint) as is_unread:
        if is_unread:
            drop(checkpoint)
        else:
            log.warning("%s is being read: it is kept for now", checkpoint)


def _drop_when_unread(copy: Path) -> None:
    told = -NOTE_EVERY_S
    while True:
        with unread(copy) as is_unread:
            if is_unread:
                remove_folder(copy)
                return
        if time.monotonic() - told >= NOTE_EVERY_S:
            told = time.monotonic()
            log.info("waiting for the command that reads %s, which is written again", copy)
        time.sleep(LOOK_EVERY_S)


def _drop_optimizer(checkpoint: Path) -> None:
    if not has_optimizer(checkpoint):
        return
    if (checkpoint / CHECKSUMS).exists():  # first: else a kill would leave one that looks damaged
        write_checksums(checkpoint, _without_optimizer(files_below(checkpoint)))
    for name in OPTIMIZER_STATE:
        remove_folder(checkpoint / name)


def _without_optimizer(names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's files that weights alone have, and that have a checksum."""
    return [name for name in names if name.split("/")[0] not in (*OPTIMIZER_STATE, LOG)]
