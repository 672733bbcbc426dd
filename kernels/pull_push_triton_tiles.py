"""The tiles that the kernels of pull_push run on, and their compile-time constants."""

from typing import Any, NamedTuple

import torch
import triton

from alignlab.kernels.cosine import NORM_EPS


class Tile(NamedTuple):
    """An outcome of `rows` x `columns`, computed in steps of `depth`, and how that is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By bytes per element and architecture (80 stands for all before 90). The largest that compile
# without spilling registers. An overlap tile is as wide as a group of the packed mask, which has
# four planes; a gradient tile is as deep as one.
OVERLAP_TILES = {
    (2, 80): Tile(64, 256, 64, 8, 3),
    (2, 90): Tile(128, 256, 64, 8, 3),
    (4, 80): Tile(64, 128, 32, 8, 3),
    (4, 90): Tile(128, 128, 32, 8, 3),
}
GRADIENT_TILES = {2: Tile(128, 256, 64, 8, 3), 4: Tile(128, 64, 32, 8, 3)}
MASK_BITS = 2
SUBJECT_TILE = 64
HOLE_COLUMNS = 1024
ROW_ELEMENTS = 4096

# Products of 16-bit floats are exact anyway; float32 is split into three products of tensor floats.
_PRECISION = {2: "ieee", 4: "tf32x3"}


def overlap_tile(x: torch.Tensor) -> Tile:
    before_90 = x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0)
    return OVERLAP_TILES[x.element_size(), 80 if before_90 else 90]


def unit_constants(width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return dict(C=width, BLOCK_C=block, ROWS=max(1, ROW_ELEMENTS // block), EPS=NORM_EPS)


def overlap_constants(tile: Tile, element_size: int, width: int, keep: bool) -> dict[str, Any]:
    return dict(
        C=width,
        KEEP=keep,
        ROWS=tile.rows,
        DEPTH=tile.depth,
        Q=GRADIENT_TILES[element_size].depth,
        BITS=MASK_BITS,
        PRECISION=_PRECISION[element_size],
        EPS=NORM_EPS,
    )


def gradient_constants(element_size: int, width: int) -> dict[str, Any]:
    tile = GRADIENT_TILES[element_size]
    return dict(
        C=width,
        ROWS=tile.rows,
        CHANNELS=tile.columns,
        Q=tile.depth,
        BITS=MASK_BITS,
        PRECISION=_PRECISION[element_size],
        EPS=NORM_EPS,
    )
