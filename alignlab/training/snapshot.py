"""What a checkpoint holds of a step, in memory: as training has it, or copied while it goes on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from alignlab.distributed.sharding import local_part
from alignlab.runs.checkpoint_folders import OPTIMIZER, STATE, mark_checkpoint
from alignlab.runs.checksums import write_checksums
from alignlab.runs.metric_rows import LogMark
from alignlab.training.checkpoint import TrainState, Weights, named_state


@dataclass(frozen=True)
class Snapshot:
    """A state after a step.

    Args:
        state: whose kind of weights it is; of it nothing is read that training changes.
        weights: `TrainState.weights`.
        moments: the optimizer's state by name; None: it is not written.
        facts: of `state.json`.
        log: what the run's log held.
    """

    state: TrainState
    weights: Weights
    moments: dict[str, Tensor] | None
    facts: dict[str, Any]
    log: LogMark | None

    @classmethod
    def of(cls, state: TrainState, log: LogMark | None, *, weights_only: bool) -> "Snapshot":
        """Without a copy: to be written before training goes on."""
        moments = None if weights_only else named_state(state.optimizer, state.names)
        return cls(state, state.weights(), moments, state.facts(), log)

    def in_main_memory(self) -> "Snapshot":
        """A copy that no step changes."""
        weights = {file: _copied(tensors) for file, tensors in self.weights.items()}
        moments = None if self.moments is None else _copied(self.moments)
        return replace(self, weights=weights, moments=moments)

    @property
    def num_bytes(self) -> int:
        """Of the tensors that this rank holds."""
        return sum(part.numel() * part.element_size() for part in map(local_part, self._tensors()))

    @property
    def step(self) -> int:
        """After which it was taken."""
        return int(self.facts["step"])

    def _tensors(self) -> Iterator[Tensor]:
        for tensors in (*self.weights.values(), self.moments or {}):
            yield from tensors.values()

    def write(self, folder: Path) -> None:
        """Writes a checkpoint into a folder."""
        self.state.write_weights(folder, self.weights)
        if self.moments is not None:
            moments = {name: value.cpu().contiguous() for name, value in self.moments.items()}
            save_file(moments, folder / OPTIMIZER)
        self.write_facts(folder)

    def write_facts(self, folder: Path) -> None:
        """Writes what comes last: the facts, and checksums of all files."""
        (folder / STATE).write_text(json.dumps(self.facts))
        write_checksums(folder)
        # by itself: the log has times, and all else is the same whenever it is trained
        mark_checkpoint(folder, self.log)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            name: tensor.detach().contiguous().to("cpu", copy=True)
            for name, tensor in tensors.items()
        }
