"""How tensors are stored: as they are, or as bf16, fp8 or int8 with a scale per token.

A token is a vector along the last dimension. What is stored in fewer bits is read in the dtype that
it had, the same bits every time.

bf16  rounded to even
fp8   e4m3, each token divided by its largest magnitude / 448
int8  each token divided by its largest magnitude / 127, rounded to even

A scale per token has the smallest cosine error of fp8 on DINO features of real clips, both mean and
maximum: `docs/dataset_cache.md` has the figures. It also needs nothing of other tokens, so that a
token's bits depend on that token alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.dataset_cache.key import StorageDtype

FP8_MAX = 448.0
INT8_MAX = 127.0
STORABLE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""What safetensors calls the dtypes that it has."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored.

    Args:
        values: of the same shape, on the CPU, in memory of its own.
        scale: float32, one for each token, shaped as `values` but for a last dimension of 1; None:
            there is none.
        dtype: that it is read in.
    """

    values: Tensor
    scale: Tensor | None
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor; shares memory with `values` where nothing was changed."""
        if self.scale is not None:
            return (self.values.float() * self.scale).to(self.dtype)
        return self.values.to(self.dtype)


@dataclass(frozen=True)
class CosineError:
    """1 - cosine between what was computed and what is read, over the tokens of an entry."""

    mean: float
    max: float


def store_exactly(tensor: Tensor) -> Stored:
    """Keeps dtype and bits.

    Raises:
        TypeError: safetensors has no such dtype.
    """
    if tensor.dtype not in STORABLE:
        raise TypeError(f"the dataset cache stores no {tensor.dtype}")
    values = tensor.detach().to("cpu", copy=True).contiguous()
    return Stored(values, None, values.dtype)


def store_lossy(tensor: Tensor, dtype: StorageDtype) -> Stored:
    """Stores floating-point values in fewer bits.

    What cannot be is kept exactly: other dtypes, tensors without tokens, and tensors that are not
    finite, before or after, so that what is wrong with them is seen where it would be seen live.
    """
    exact = store_exactly(tensor)
    values = exact.values
    if not values.is_floating_point() or values.dim() == 0 or values.numel() == 0:
        return exact
    if not values.isfinite().all():
        return exact
    lossy = _LOSSY[dtype](values)
    stored = Stored(lossy[0], lossy[1], values.dtype)
    return stored if stored.read().isfinite().all() else exact


def is_exact(stored: Stored) -> bool:
    """Whether dtype and bits are those that were given."""
    return stored.scale is None and stored.values.dtype == stored.dtype


def cosine_error(given: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> CosineError | None:
    """Of all tokens that were not kept exactly; None: there are none."""
    errors = []
    for name, tensor in given.items():
        kept = stored[name]
        if is_exact(kept):
            continue
        before = tensor.detach().to("cpu", torch.float64).reshape(-1, tensor.shape[-1])
        after = kept.read().to(torch.float64).reshape(-1, tensor.shape[-1])
        cosine = F.cosine_similarity(before, after, dim=-1)
        both_zero = (before == 0).all(-1) & (after == 0).all(-1)
        errors.append(torch.where(both_zero, 0.0, 1 - cosine))
    if not errors:
        return None
    error = torch.cat(errors).clamp(min=0)
    return CosineError(float(error.mean()), float(error.max()))


def _as_bf16(values: Tensor) -> tuple[Tensor, None]:
    return values.to(torch.bfloat16), None


def _as_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = _scale(values, FP8_MAX)
    return (values.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def _as_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = _scale(values, INT8_MAX)
    return (values.float() / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def _scale(values: Tensor, largest: float) -> Tensor:
    scale = values.float().abs().amax(-1, keepdim=True) / largest
    return torch.where(scale > 0, scale, 1.0)


_LOSSY = {"bf16": _as_bf16, "fp8": _as_fp8, "int8": _as_int8}
