"""Whether a best value lies on the border of what was searched, and could lie beyond it."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.experiments.sweep.borders import border, shown_range
from alignlab.experiments.sweep.config import SweepConfig, load_sweep
from small_recipes import sweep_recipe


def swept(recipe_file: Path, folder: Path, key: str, **space: object) -> SweepConfig:
    text = f"metric: val/flow\ntrials: 1\nspace: {{{key}: {json.dumps(space)}}}\n"
    return load_sweep(sweep_recipe(recipe_file, folder / "sweep.yaml", text))


WEIGHT = {"kind": "float", "low": 0.1, "high": 10.0, "log": True}
BLOCKS = {"kind": "blocks", "choose": "range", "first": 1, "last": 2}


@pytest.mark.parametrize(
    ("key", "space", "value", "end"),
    [
        ("objectives.ra.weight", WEIGHT, 0.1, "lower"),
        ("objectives.ra.weight", WEIGHT, 0.12, "lower"),
        ("objectives.ra.weight", WEIGHT, 0.2, None),
        ("objectives.ra.weight", WEIGHT, 5.0, None),
        ("objectives.ra.weight", WEIGHT, 9.0, "upper"),
        ("objectives.ra.weight", WEIGHT | {"log": False}, 5.0, None),
        ("objectives.ra.weight", WEIGHT | {"log": False, "step": 3.3}, 9.5, None),
        ("objectives.ra.weight", WEIGHT | {"low": 10.0}, 10.0, None),
        # no weight is below 0, and no gate counts below nothing
        ("objectives.ra.weight", {"kind": "float", "low": 0.0, "high": 1.0}, 0.01, None),
        ("objectives.ra.weight", {"kind": "float", "low": 0.0, "high": 1.0}, 0.99, "upper"),
        ("optim.warmup", {"kind": "int", "low": 0, "high": 2}, 0, None),
        ("optim.warmup", {"kind": "int", "low": 1, "high": 3}, 1, "lower"),
        ("optim.warmup", {"kind": "int", "low": 1, "high": 3}, 2, None),
        ("objectives.ra.blocks", BLOCKS, [1], "lower"),
        ("objectives.ra.blocks", BLOCKS, [2], "upper"),
        ("objectives.ra.blocks", BLOCKS, [1, 2], None),
        # the model has four blocks
        ("objectives.ra.blocks", BLOCKS | {"first": 0, "last": 3}, [0], None),
        ("objectives.ra.blocks", BLOCKS | {"first": 0, "last": 3}, [3], None),
        ("objectives.ra.gate", {"kind": "categorical", "choices": ["none", "t^3"]}, "none", None),
    ],
)  # fmt: skip
def test_the_end_at_which_a_value_lies(
    recipe_file: Path, tmp_path: Path, key: str, space: dict[str, Any], value: Any, end: str | None
) -> None:
    assert border(swept(recipe_file, tmp_path, key, **space), key, value) == end


def test_ranges_in_words(recipe_file: Path, tmp_path: Path) -> None:
    def words(key: str, **space: object) -> str:
        return shown_range(swept(recipe_file, tmp_path, key, **space).space[key])

    assert words("objectives.ra.weight", **WEIGHT) == "0.1 to 10 (log)"
    assert words("optim.warmup", kind="int", low=0, high=4, step=2) == "0 to 4 (step 2)"
    assert words("objectives.ra.blocks", **BLOCKS) == "up to 2 neighbours, 1 to 2"
    choices = words("objectives.ra.gate", kind="categorical", choices=["none", "t^3"])
    assert choices == "one of none, t^3"
