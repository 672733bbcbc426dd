"""Short names for the exact values of weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights_digest(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Hashes names and values, in order of name, the same on every device.

    Args:
        tensors: by name.
        dtype: rounds to it first, so that what was loaded in another precision has the same name.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        values = tensors[name].detach().to("cpu", dtype).contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()


def frozen_digest(module: nn.Module) -> str:
    """Hashes the parameters that are not trained."""
    return weights_digest({n: p for n, p in module.named_parameters() if not p.requires_grad})
