"""Optimizer state as named tensors, so that it can live in safetensors instead of a pickle."""

from typing import Any

import torch
from torch import Tensor

SEPARATOR = "|"


def named_state(optimizer: torch.optim.Optimizer, names: dict[Any, str]) -> dict[str, Tensor]:
    """Every state tensor under `<parameter name>|<state name>`.

    Args:
        optimizer: an optimizer whose state values are tensors (AdamW's are).
        names: the name of each parameter that it updates.
    """
    return {
        f"{names[parameter]}{SEPARATOR}{key}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_state(
    optimizer: torch.optim.Optimizer, names: dict[Any, str], tensors: dict[str, Tensor]
) -> None:
    """Puts back what `named_state` gave. `step` counters stay on the CPU, as torch keeps them.

    Raises:
        KeyError: a tensor belongs to no parameter of this optimizer.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, state_name = key.rsplit(SEPARATOR, 1)
        parameter = by_name[name]
        device = "cpu" if state_name == "step" else parameter.device
        # a copy: on a CPU the loaded tensor may be a view of the checkpoint's file
        optimizer.state[parameter][state_name] = value.to(device, copy=True)
