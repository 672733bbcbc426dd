"""The relation kernels, compiled for GPUs at the tiles that are launched there."""

from typing import Any

import pytest
import torch

import gpu_builds
from alignlab.kernels import relation_triton_kernels
from alignlab.kernels.relation_triton_kernels import TILES

VECTORS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TYPES = {"saliency_ptr": "*fp32", "sums_ptr": "*fp32", "codes_ptr": "*u8", "factor_ptr": "*fp32"}
TYPES |= {"slope_ptr": "*fp32", "scale_ptr": "*fp32", "margin": "fp32", "eps": "fp32"}
INTEGERS = ["squares", "side", "frames", "tokens", "stride", "places"]
KERNELS = ["distance_kernel", "slope_kernel", "unit_kernel", "norm_gradient_kernel"]
# (architecture, dtype) of each row of the table of tiles
GPUS = [
    *(pytest.param(80, dtype, marks=pytest.mark.slow) for dtype in VECTORS),
    (90, torch.bfloat16),
    pytest.param(90, torch.float32, marks=pytest.mark.slow),
]


def build(name: str, architecture: int, dtype: torch.dtype) -> Any:
    """A launch for D=768 and a routing that reads saliencies."""
    tiles = TILES[dtype.itemsize, architecture >= 90]
    unit = torch.empty(1, 128, 768, dtype=dtype, device="meta")
    constants = {
        "distance_kernel": relation_triton_kernels.distance_constants(
            unit, unit, tiles, "or", True
        ),
        "slope_kernel": relation_triton_kernels.slope_constants(unit, tiles, "or"),
    }.get(name, relation_triton_kernels.row_constants(unit, unit))
    launch = {option: constants.pop(option, 4) for option in ("num_warps", "num_stages")}
    arguments = getattr(relation_triton_kernels, name).arg_names
    by_name = TYPES | dict.fromkeys(INTEGERS, "i32")
    types = {x: by_name.get(x, VECTORS[dtype]) for x in arguments if x not in constants}
    module = "alignlab.kernels.relation_triton_kernels"
    settings = (tuple(types.items()), tuple(constants.items()))
    return gpu_builds.Build(module, name, *settings, **launch, architectures=(architecture,))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("architecture", "dtype"), GPUS, ids=str)
def test_fits_a_gpu_without_spilling(name: str, architecture: int, dtype: torch.dtype) -> None:
    builds = list(dict.fromkeys(build(kernel, architecture, dtype) for kernel in KERNELS))
    facts = gpu_builds.compile_builds(*builds)
    fact = facts[builds.index(build(name, architecture, dtype))][architecture]
    assert fact.spill_bytes == 0
    assert fact.shared_bytes <= gpu_builds.SHARED_LIMITS[architecture]
    assert fact.tensor_cores == (name in ("distance_kernel", "slope_kernel"))
