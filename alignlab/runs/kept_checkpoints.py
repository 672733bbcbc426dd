"""What is left of the checkpoints of a finished run (`checkpoint.keep_finished`).

They are dropped once the result is there. What a kill in between left is dropped by the next
command that finds the run finished.
"""

import logging
from pathlib import Path

from alignlab.config.parts import TrainingConfig
from alignlab.errors import UserError
from alignlab.runs.atomic_files import remove_folder
from alignlab.runs.checkpoint_folders import LOG, OPTIMIZER, step_folders
from alignlab.runs.checksums import CHECKSUMS, files_below, write_checksums
from alignlab.runs.run_folder import RunFolder, only_writer

log = logging.getLogger(__name__)


def drop_checkpoints(folder: RunFolder, config: TrainingConfig) -> None:
    """Drops what is not to be kept of a finished run.

    Args:
        folder: of the run; this process holds its lock.
        config: its recipe.
    """
    keep, checkpoints = config.checkpoint.keep_finished, step_folders(folder.checkpoints)
    if keep == "all" or not folder.is_finished_at(config.steps):
        return
    for checkpoint in checkpoints[:-1] if keep == "weights" else checkpoints:
        remove_folder(checkpoint)
    for checkpoint in checkpoints[-1:] if keep == "weights" else ():
        _drop_optimizer(checkpoint)


def drop_if_unread(folder: RunFolder, config: TrainingConfig) -> None:
    """Drops what a kill has left, unless another process works in the folder."""
    if config.checkpoint.keep_finished == "all" or not step_folders(folder.checkpoints):
        return
    try:
        with only_writer(folder.path, wait=False):
            drop_checkpoints(folder, config)
    except UserError as error:
        log.warning("its checkpoints are kept for now: %s", error)


def _drop_optimizer(checkpoint: Path) -> None:
    if not (checkpoint / OPTIMIZER).exists():
        return
    if (checkpoint / CHECKSUMS).exists():  # first: else a kill would leave one that looks damaged
        names = [name for name in files_below(checkpoint) if name not in (OPTIMIZER, LOG)]
        write_checksums(checkpoint, names)
    (checkpoint / OPTIMIZER).unlink()
