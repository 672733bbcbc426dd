"""Every kernel of pull_push, compiled for GPUs on the CPU as it is launched there."""

import re
from typing import Any

import pytest

import gpu_builds
from alignlab.kernels import pull_push_triton_kernels as kernels

WIDTH = 1024
FLOATS = {2: "*bf16", 4: "*fp32"}
# By ending of the name; every other pointer is to float32, every other number an int32.
POINTERS = {"ids_ptr": "*i64", "words_ptr": "*u8"} | dict.fromkeys(
    ["subject_ptr", "others_ptr", "hole_ptr"], "*i32"
)
OF_INPUT = ("student_ptr", "teacher_ptr", "unit_ptr", "grad_ptr")


def build(
    kernel: str, size: int, constants: dict[str, Any], tile: kernels.Tile, archs: tuple[int, ...]
) -> Any:
    names = [name for name in getattr(kernels, kernel).arg_names if re.match(r"[a-z]", name)]

    def type_of(name: str) -> str:
        if name in OF_INPUT:
            return FLOATS[size]
        if name == "threshold":
            return "fp32"
        return POINTERS.get(name, "*fp32" if name.endswith("_ptr") else "i32")

    types = tuple((name, type_of(name)) for name in names)
    return gpu_builds.Build(
        kernels.__name__, kernel, types, tuple(constants.items()), tile.warps, tile.stages, archs
    )


def builds(arch: int) -> dict[str, Any]:
    """Those for an architecture, by name."""
    only, default = (arch,), kernels.Tile(0, 0, 0, 4, 3)  # Triton's own defaults
    subjects = dict(TILE=kernels.SUBJECT_TILE)
    hole = dict(ROWS=128, COLUMNS=kernels.HOLE_COLUMNS, Q=64)
    launches = {
        "subjects": build("subjects_kernel", 2, subjects, default, only),
        "unit": build("unit_kernel", 2, kernels.unit_constants(WIDTH), default, only),
        "hole": build("hole_kernel", 2, hole, default, only),
    }
    for (size, of_arch), tile in kernels.OVERLAP_TILES.items():
        if of_arch == arch:
            constants = kernels.overlap_constants(tile, size, WIDTH, keep=True)
            launches[f"overlap-{8 * size}bit"] = build(
                "overlap_kernel", size, constants, tile, only
            )
    for size, tile in kernels.GRADIENT_TILES.items():
        constants = kernels.gradient_constants(size, WIDTH)
        launches[f"gradient-{8 * size}bit"] = build("gradient_kernel", size, constants, tile, only)
    return launches


BUILDS = {arch: builds(arch) for arch in gpu_builds.SHARED_LIMITS}


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("name", BUILDS[90])
def test_no_spills_and_shared_memory_and_tensor_cores(name: str, arch: int) -> None:
    facts = gpu_builds.compile_builds(*BUILDS[arch].values())
    fact = dict(zip(BUILDS[arch], facts, strict=True))[name][arch]
    assert fact.spill_bytes == 0
    assert fact.shared_bytes <= gpu_builds.SHARED_LIMITS[arch]
    assert fact.tensor_cores == name.startswith(("overlap", "gradient"))
