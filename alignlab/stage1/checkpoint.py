"""Checkpoints of Stage 1: safetensors and JSON in a folder that is there whole or not at all.

checkpoints/step-000500/
    network.safetensors     weights
    optimizer.safetensors   AdamW moments, by parameter name
    state.json              step
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alignlab.runs.run_folder import whole_folder
from alignlab.training.checkpoint import prune, step_path
from alignlab.training.optimizer_state import named_state, restore_state


@dataclass
class Stage1State:
    """All that changes during training.

    Args:
        network: what is trained.
        optimizer: over its parameters.
        step: optimizer steps done.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    names: dict[nn.Parameter, str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = {p: name for name, p in self.network.named_parameters()}


def save(state: Stage1State, checkpoints: Path, *, keep: int) -> Path:
    """Writes `step-<step>` and removes all but the newest `keep` checkpoints."""
    target = step_path(checkpoints, state.step)
    weights = {name: p.detach().cpu().contiguous() for p, name in state.names.items()}
    with whole_folder(target) as folder:
        save_file(weights, folder / "network.safetensors")
        save_file(named_state(state.optimizer, state.names), folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": state.step}))
    prune(checkpoints, keep)
    return target


def restore(state: Stage1State, checkpoint: Path) -> None:
    """Puts a checkpoint of the same recipe back into a freshly built state."""
    state.network.load_state_dict(load_file(checkpoint / "network.safetensors"))
    restore_state(state.optimizer, state.names, load_file(checkpoint / "optimizer.safetensors"))
    state.step = int(json.loads((checkpoint / "state.json").read_text())["step"])
