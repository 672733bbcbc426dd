"""Runs of `sharded_runs.py`: what they left, and whether two differ by rounding alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rank_processes import driven
from run_contents import timeless_rows
from sharded_runs import train_jobs

RECIPE_CHANGES = {
    "steps: 2": "steps: 4",
    "references: [2, 3]": "references: [0, 3]",
    "batch_size: 2}": "batch_size: 12, accumulate: 2, ema: 0.9, grad_clip: 0.05}",
    "{clips: 2,": "{every: 3, clips: 2,",
    "sample_clips: 0": "sample_clips: 1",
    "optim:": "  repa: {name: repa, teacher: dino, blocks: [1], projector_dim: 8}\noptim:",
}
EXACT = ("loss", "grad", "val", "lr")


def write_recipe(recipe_file: Path, folder: Path) -> Path:
    """A recipe of four steps with what a run can do, and a checkpoint every second step."""
    text = recipe_file.read_text()
    for before, after in RECIPE_CHANGES.items():
        assert before in text
        text = text.replace(before, after)
    path = folder / "recipe.yaml"
    path.write_text(text + "checkpoint: {every: 2}\n")
    return path


def drive(recipe: Path, *jobs: str) -> list[str]:
    """Exit codes of the processes of each job; the runs lie beside the recipe."""
    return driven(lambda: train_jobs(recipe, recipe.parent, jobs), recipe.parent / "driver")


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds besides the optimizer's state, parts put together."""
    step = sorted((run / "checkpoints").glob("step-*"))[-1]
    found: dict[str, list[torch.Tensor]] = {}
    for path in sorted(step.rglob("*.safetensors")):
        name = path.relative_to(step).parts[0].removesuffix(".safetensors").removesuffix("_shards")
        if name != "optimizer":
            for key, value in load_file(path).items():
                found.setdefault(f"{name} {key}", []).append(value)
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in found.items()}


def assert_as_one(one: Path, other: Path, rel: float = 1e-5, apart: tuple[str, ...] = ()) -> None:
    """Losses and weights are equal to `rel`, other numbers as far as they can be.

    Those whose names begin with one of `apart` may differ.
    """
    for row, twin in zip(timeless_rows(one), timeless_rows(other), strict=True):
        assert row.keys() == twin.keys()
        row, twin = ({k: v for k, v in r.items() if not k.startswith(apart)} for r in (row, twin))
        # clips are rounded to 8 bits
        assert twin == pytest.approx(row, rel=max(rel, 1e-2), abs=max(10 * rel, 1e-3))
        exact = {key: value for key, value in row.items() if key.startswith(EXACT)}
        assert {key: twin[key] for key in exact} == pytest.approx(exact, rel=rel)
    expected, found = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=rel, atol=rel, msg=key)
