"""Rows of `alignlab bench kernels` that nobody measured, of a GPU that nobody has."""

from pathlib import Path

import torch

from alignlab.kernels import speed_table
from alignlab.kernels.bench.cases import Case, Op
from alignlab.kernels.bench.csv_file import Row, to_csv, to_row
from alignlab.kernels.bench.measure import Spread
from alignlab.kernels.bench.run import Measurement, Provider

GPU = "Made-up GPU"


def software() -> dict[str, str]:
    """The versions that this machine's own rows would have."""
    triton = speed_table._this_software().split("Triton ")[1]
    return {"torch_version": torch.__version__, "triton_version": triton}


def made_up_row(
    provider: Provider,
    milliseconds: float,
    *,
    op: Op = "pull_push",
    size: tuple[int, int] = (3, 30),
    width: int = 16,
    blocks: int = 1,
    dtype: torch.dtype = torch.float32,
    noise: float = 0.01,
    **facts: str,
) -> Row:
    """A forward and backward pass; `facts` replace columns such as `gpu_name`."""
    case = Case(op, *size, width, blocks, dtype)
    spread = Spread(milliseconds, milliseconds * (1 - noise), milliseconds * (1 + noise))
    known = {
        "gpu_name": GPU,
        "timestamp": "2026-01-01 00:00:00",
        "alignlab_version": "0",
        "commit": "aaaaaaaaa",
        **software(),
    }
    return to_row(Measurement(case, provider, "full", "speed", spread, 1), known | facts)


def write_rows(path: Path, *rows: Row) -> Path:
    """Writes a table as the benchmark does."""
    path.write_text(to_csv(rows))
    return path
