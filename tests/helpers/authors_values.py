"""Inputs by formula, and what the authors' own code makes of them (`tests/authors_values`)."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "authors_values"


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers of about unit size that need no storing, in float64."""
    k = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)
    return torch.sin(0.7 * k + phase) + 0.5 * torch.cos(1.3 * k + 2 * phase)


@torch.no_grad()
def fill_with_waves(module: nn.Module) -> None:
    """Gives every parameter a wave of its own, scaled so that a deep network stays in range."""
    for place, (name, weight) in enumerate(sorted(module.named_parameters())):
        values = wave(*weight.shape, phase=float(place))
        if weight.ndim == 1:  # biases, gains of norms
            values = 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
        elif "table" in name:  # modulation
            values = 0.3 * values
        else:
            values = 1.5 * values / math.sqrt(weight[0].numel())
        weight.copy_(values)


def stored_tensors(name: str) -> dict[str, Tensor]:
    """Arrays that the authors' code gave."""
    return load_file(FOLDER / f"{name}.safetensors")


def stored_numbers(name: str) -> dict[str, Any]:
    """Single numbers that the authors' code gave."""
    numbers: dict[str, Any] = json.loads((FOLDER / "numbers.json").read_text())[name]
    return numbers
