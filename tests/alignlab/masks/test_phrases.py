"""Noun phrases of captions by a rule: how good it is where it is known."""

import pytest

from alignlab.config.data import ShapesConfig
from alignlab.data.real_clips.manifest import CUTS, OUTLINES
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.masks.phrases import MOST, noun_phrases


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A dog runs on a wet beach.", ("dog", "wet beach")),
        ("Two dogs and a cat", ("dogs", "cat")),
        ("a bus passes the glass house", ("bus", "glass house")),
        ("A bicycle locked to an old railing", ("bicycle", "old railing")),
        ("a dog, a dog, in the background", ("dog",)),
        ("It is very slowly", ()),
        ("", ()),
    ],
)
def test_phrases_of_a_caption(caption: str, phrases: tuple[str, ...]) -> None:
    assert noun_phrases(caption) == phrases


def test_no_more_than_the_most() -> None:
    assert len(noun_phrases(", ".join(f"a dog{n}" for n in range(20)))) == MOST


def test_most_references_of_the_real_clips_are_named() -> None:
    wanted = found = 0
    for cut in CUTS.values():
        given = noun_phrases(cut.caption)
        for subject in cut.subjects:
            phrase = OUTLINES[subject].phrase.split(" ", 1)
            bare = phrase[1] if phrase[0] in ("a", "an", "the") else " ".join(phrase)
            wanted += 1
            found += bare in given
    assert wanted == 44 and found >= 33  # docs/masks.md


def test_the_entities_of_shapes_are_found() -> None:
    dataset = ShapesDataset(ShapesConfig(train_clips=30), "train")
    for index in range(30):
        assert set(noun_phrases(dataset.caption(index))) == set(dataset.entities(index))
