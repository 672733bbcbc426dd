"""Checkpoints of a state, as a training of one process writes them."""

from pathlib import Path

import torch

from alignlab.config.parts import CheckpointConfig
from alignlab.distributed.ranks import Ranks
from alignlab.runs.run_folder import RunFolder
from alignlab.training.checkpoint import TrainState
from alignlab.training.save_checkpoint import save_due


def save(state: TrainState, checkpoints: Path, *, keep: int) -> Path:
    """The checkpoint of a state; all but the newest `keep` are removed."""
    folder = RunFolder(checkpoints.parent)
    folder.checkpoints = checkpoints
    ranks = Ranks(torch.device("cpu"), "fp32")
    path = save_due(state, folder, ranks, CheckpointConfig(keep=keep))
    assert path is not None
    return path
