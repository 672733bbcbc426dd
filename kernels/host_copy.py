"""Copies from the host to a device for which the host does not wait."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies what was made on the CPU: to a GPU through pinned memory, in turn with its other work.

    What is on such a device, or stays on the CPU, is returned as it is.
    """
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    # Metal may read the source later than it is freed
    return x.to(device, non_blocking=device.type != "mps")
