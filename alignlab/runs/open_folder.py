"""The folder of a training before it trains: checked, locked, and where to go on from."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from alignlab.config.parts import TrainingConfig
from alignlab.runs.atomic_files import clear_leftovers
from alignlab.runs.checkpoint_folders import log_mark, resumable
from alignlab.runs.input_record import hold_inputs
from alignlab.runs.kept_checkpoints import (
    drop_checkpoints,
    drop_if_unread,
    drop_later_copies,
    make_up_for_copy,
)
from alignlab.runs.metric_rows import check_log
from alignlab.runs.prolong import take_back_result
from alignlab.runs.run_folder import RunFolder, only_writer
from alignlab.stage1.compatibility import is_finished

log = logging.getLogger(__name__)


class OpenedFolder(NamedTuple):
    """A run folder before its training.

    Args:
        folder: of the run.
        is_finished: nothing is left to do.
        newest: the checkpoint to resume from, which is whole.
        notes: what was damaged, for the result.
    """

    folder: RunFolder
    is_finished: bool
    newest: Path | None
    notes: tuple[str, ...]


def open_folder(config: TrainingConfig, locks: ExitStack, *, wait: bool) -> OpenedFolder:
    """Opens the folder of a training, which may be an interrupted one.

    Args:
        config: the recipe.
        locks: keeps the lock of a folder that will be written.
        wait: for another command that trains this run; else refuse.

    Raises:
        UserError: the folder holds another recipe or other inputs, another command trains there, or
            it is finished with another Stage 1 network, or what it keeps is damaged.
    """
    folder = RunFolder.create(config)
    was_finished = folder.is_finished_at(config.steps)
    if not was_finished:
        locks.enter_context(only_writer(folder.path, wait=wait))
        clear_leftovers(folder.checkpoints)
        folder.check_goes_on(config)  # whoever held the lock may have changed it meanwhile
        take_back_result(folder, config)
        folder.take_settings(config)
    hold_inputs(folder, config)
    if is_finished(config, folder):
        log.info("%s is finished already: all %d steps are trained", folder.path, config.steps)
        drop = drop_if_unread if was_finished else drop_checkpoints  # the lock is held by now
        drop(folder, config)
        return OpenedFolder(folder, True, None, ())
    newest, notes = resumable(folder.checkpoints)
    drop_later_copies(folder.checkpoints, newest)
    if newest is not None:
        make_up_for_copy(newest, config)
        notes += check_log(folder.metrics, log_mark(newest))
    return OpenedFolder(folder, False, newest, notes)
