"""Attention backends made for tests, and CUDA's autocast policy on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What CUDA's autocast runs in fp32 (torch's documentation of AMP, and rms_norm).
IN_FP32_ON_CUDA = """
__pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cdist cosh
cosine_embedding_loss cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1
group_norm hinge_embedding_loss kl_div l1_loss layer_norm log log10 log1p log2 log_softmax
margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss nll_loss norm normalize
pdist poisson_nll_loss pow prod reciprocal renorm rms_norm rsqrt sinh smooth_l1_loss
soft_margin_loss softmax softmin softplus sum tan triplet_margin_loss
""".split()
STOOD_IN = "_native_math"  # the backend that others stand in for: it needs no package


def run_norms_as_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, `nn.RMSNorm` gives fp32: CUDA's policy, which the CPU's lacks."""
    forward = nn.RMSNorm.forward

    def in_fp32(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return forward(norm, x)
        return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps)

    monkeypatch.setattr(nn.RMSNorm, "forward", in_fp32)


class BF16InFp32Functions(TorchFunctionMode):
    """Notes the functions that CUDA's autocast runs in fp32 and that get a bf16 tensor."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if func.__name__ in IN_FP32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            if any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in given):
                self.names.add(func.__name__)
        return func(*args, **kwargs)


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
