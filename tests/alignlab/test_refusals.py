"""What a recipe asks for and the data or the machine does not have: one line, before any step."""

from pathlib import Path

import pytest

from alignlab.data.shapes.dataset import ShapesDataset
from command_line import alignlab, refused

MASKS = "{name: sara, teacher: dino, blocks: [1], projector_dim: 8, saliency: masks, routing: %s}"


def test_clips_without_the_masks_that_an_objective_needs(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShapesDataset, "without_masks", lambda dataset: f"{dataset.split}-7.mp4")
    into = f"output={tmp_path}"
    message = refused("train", recipe_file, into, f"objectives={{sa: {MASKS % 'or'}}}")
    assert "objectives.sa: needs entity masks, and train-7.mp4 has none; add `masks`" in message
    assert not list(tmp_path.rglob("metrics.jsonl"))
    # no objective of these needs any
    unread = f"objectives={{sa: {MASKS % 'uniform'}}}"
    assert alignlab("train", recipe_file, into, unread, "name=b").exit_code == 0


@pytest.mark.parametrize(
    "settings",
    [
        "{name: refalign, teacher: dino, blocks: [0], impl: triton}",
        "{name: videorepa, teacher: dino, blocks: [0], projector_dim: 8, impl: triton}",
    ],
)
def test_an_implementation_that_cannot_run_here(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = refused("train", recipe_file, f"output={tmp_path}", f"objectives={{al: {settings}}}")
    assert message.startswith("error: objectives.al: ") and "triton" in message
    assert not list(tmp_path.rglob("result.json"))


def test_an_implementation_that_does_not_exist(recipe_file: Path, tmp_path: Path) -> None:
    message = refused("train", recipe_file, f"output={tmp_path}", "objectives.ra.impl=tritn")
    assert "objectives.ra.impl: unknown value 'tritn', did you mean 'triton'?" in message


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data.size=[16,1040]", "data.size: 65 positions, this transformer has 32"),
        (
            "data.frames=253",
            "data.frames and data.references: 67 positions, this transformer has 32",
        ),
    ],
)
def test_clips_that_the_transformer_has_no_positions_for(
    setting: str, expected: str, recipe_file: Path, tmp_path: Path
) -> None:
    message = refused("train", recipe_file, f"output={tmp_path}", setting)
    assert expected in message


def test_too_few_tokens_to_measure(recipe_file: Path, tmp_path: Path) -> None:
    few = ["data.size=[16,16]", "data.frames=9", "eval.clips=1", "eval.generated_clips=0"]
    message = refused("train", recipe_file, f"output={tmp_path}", *few, "eval.sample_clips=0")
    assert "eval.clips: 1 of 3 tokens in all are too few to measure: at least 4" in message
    assert not list(tmp_path.rglob("metrics.jsonl"))
