"""Attention backends made for tests, and CUDA's autocast policy on a CPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn

STOOD_IN = "_native_math"  # the backend that others stand in for: it needs no package


def run_norms_as_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, `nn.RMSNorm` gives fp32: CUDA's policy, which the CPU's lacks."""
    forward = nn.RMSNorm.forward

    def in_fp32(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return forward(norm, x)
        return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps)

    monkeypatch.setattr(nn.RMSNorm, "forward", in_fp32)


def replace_backend(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor]) -> None:
    """Lets `function(query, key, value)` stand in for the backend `STOOD_IN`."""
    registry, name = attention_dispatch._AttentionBackendRegistry, AttentionBackendName(STOOD_IN)
    monkeypatch.setitem(registry._backends, name, function)
    monkeypatch.setitem(registry._supported_arg_names, name, {"query", "key", "value"})


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Right attention on (B, N, H, D), as the backends' packages lay it out."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class StrictAttention:
    """Right attention that, as xformers, wants one dtype, and notes what it was given.

    Args:
        half: as flash-attn, takes fp16 and bf16 alone.
    """

    def __init__(self, *, half: bool = False) -> None:
        self._half = half
        self.dtypes: set[torch.dtype] = set()
        self.heads: set[tuple[int, int]] = set()
        self.lengths: set[tuple[int, int]] = set()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError(f"mixed dtypes:\n{query.dtype}, {key.dtype}, {value.dtype}")
        if self._half and query.dtype == torch.float32:
            raise RuntimeError("only half precision")
        self.dtypes.add(query.dtype)
        self.heads.add((query.shape[2], query.shape[3]))
        self.lengths.add((query.shape[1], key.shape[1]))
        return attend(query, key, value)
