"""Which diffusers attention backends can train here, found out by trying them.

Shape letters: B batch, N tokens, H heads, D width of a head.
"""

import warnings

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from torch import Tensor

from alignlab.config.data import unknown_name
from alignlab.errors import UserError, one_line

PROBE_SHAPE = (1, 64, 2, 64)  # (B, N, H, D): the smallest that every backend's kernels accept
TOLERANCE = 0.1  # int8 attention stays well below, wrong results are far above

# What a backend raises that is missing, does not suit the device, or has no backward pass.
PROBE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
)


def backend_names() -> list[str]:
    """Every attention backend that this version of diffusers knows, the usual one first."""
    names = sorted(str(backend.value) for backend in AttentionBackendName)
    return sorted(names, key=lambda name: (name != "native", name.startswith("_")))


def check_backend(
    name: str, device: torch.device | str, *, dtype: torch.dtype | None = None
) -> None:
    """Make sure that `name` can train on `device`; a `*_hub` backend downloads its kernel.

    Args:
        name: a diffusers attention backend, e.g. `native`.
        device: where the model runs.
        dtype: of queries, keys and values. Left out: bfloat16 on a GPU, float32 on the CPU.

    Raises:
        UserError: no such backend, or it cannot run; says why and lists those that can.
    """
    names = backend_names()
    if name not in names:
        raise UserError(f"model.attention: {unknown_name('attention backend', name, names)}")
    reason = _why_not(AttentionBackendName(name), torch.device(device), dtype)
    if reason is not None:
        working = [key for key, why in available_backends(device, dtype=dtype).items() if not why]
        raise UserError(
            f"model.attention: {name} does not work on {torch.device(device)}: {reason}; "
            f"these do: {', '.join(working)}"
        )


def available_backends(
    device: torch.device | str, *, dtype: torch.dtype | None = None
) -> dict[str, str | None]:
    """Try every backend on a tiny tensor, forward and backward. Nothing is downloaded.

    Args:
        device: where to try them.
        dtype: as in `check_backend`.

    Returns:
        Name -> None where it works, else the reason in one line.
    """
    reasons: dict[str, str | None] = {}
    for name in backend_names():
        if name.endswith("_hub"):
            reasons[name] = _hub_reason(AttentionBackendName(name))
        else:
            reasons[name] = _why_not(AttentionBackendName(name), torch.device(device), dtype)
    return reasons


def _hub_reason(backend: AttentionBackendName) -> str:
    try:
        _check_attention_backend_requirements(backend)
    except RuntimeError as error:
        return _reason(error)
    return "not tried: its kernel is downloaded when a recipe asks for it"


def _why_not(
    backend: AttentionBackendName, device: torch.device, dtype: torch.dtype | None
) -> str | None:
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    # Drawn on the CPU so that every device is probed with the same numbers.
    query, key, value = (
        torch.randn(PROBE_SHAPE, generator=generator).to(device, dtype) for _ in range(3)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _check_attention_backend_requirements(backend)
            _maybe_download_kernel_for_backend(backend)
            difference = _difference_to_native(query, key, value, backend)
        except PROBE_ERRORS as error:
            return _reason(error, *_kernel_warnings(error, caught))
    if difference is None:
        return "it has no gradient, so it cannot train"
    if not difference < TOLERANCE:  # also true of a NaN
        return f"its result is off by {difference:.2g}"
    return None


def _kernel_warnings(error: Exception, caught: list[warnings.WarningMessage]) -> list[str]:
    """Why torch took none of its kernels: it says so in warnings and raises a general message."""
    if "No available kernel" not in str(error):
        return []
    return [str(one.message) for one in caught if "not used because" not in str(one.message)]


def _difference_to_native(
    query: Tensor, key: Tensor, value: Tensor, backend: AttentionBackendName
) -> float | None:
    """Largest difference of output and gradient to torch's attention; None without gradient."""
    actual = _output_and_gradient(query, key, value, backend)
    expected = _output_and_gradient(query, key, value, AttentionBackendName.NATIVE)
    if actual is None or expected is None:
        return None
    pairs = zip(actual, expected, strict=True)
    return max(float((mine - true).abs().max()) for mine, true in pairs)


def _output_and_gradient(
    query: Tensor, key: Tensor, value: Tensor, backend: AttentionBackendName
) -> tuple[Tensor, Tensor] | None:
    """Attention's output and the gradient of its sum of squares by the query; None: no gradient."""
    query = query.detach().requires_grad_()
    with torch.enable_grad():  # a caller under no_grad asks about training all the same
        output: Tensor = dispatch_attention_fn(query, key, value, backend=backend)
        if not output.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(output.float().square().sum(), query)
    return output.detach().float(), gradient.float()


def _reason(*messages: object) -> str:
    return " ".join(map(one_line, messages)).rstrip(".")
