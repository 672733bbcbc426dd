"""Metrics of generated clips react to what they claim to see: real clips, spoilt in known ways."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.config.data import ShapesConfig
from alignlab.data.sample import Sample
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.evaluation.collectors import GenerationCollector
from alignlab.evaluation.generation_metrics import cutout
from alignlab.evaluation.metric_registry import GENERATION_METRICS
from alignlab.teachers import Teacher, load_teacher

CLIPS = ShapesDataset(ShapesConfig(frames=9, size=(64, 64), references=(2, 3)), "val")
SAMPLES = [CLIPS[i] for i in range(8)]
GRID = (4, 4)
Measure = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("tiny-dino", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def measure(teacher: Teacher) -> Measure:
    def run(
        change: Callable[[Sample], Tensor] = lambda sample: sample.video_THWC,
        samples: list[Sample] = SAMPLES,
        subjects_by_colour: bool = True,
        features: Teacher | None = teacher,
    ) -> dict[str, float]:
        collector = GenerationCollector(features, GRID, subjects_by_colour=subjects_by_colour)
        for sample in samples:
            collector.add(change(sample), sample)
        return collector.metrics()

    return run


@pytest.fixture(scope="module")
def real(measure: Measure) -> dict[str, float]:
    return measure()


def with_references_of(sample: Sample, other: Sample, shift: int = 0) -> Sample:
    """The sample, each phrase of which now belongs to another picture."""
    pictures = [*other.references[shift:], *other.references[:shift]]
    pairs = zip(sample.references, pictures, strict=False)
    given = tuple(dataclasses.replace(new, phrase=old.phrase) for old, new in pairs)
    return dataclasses.replace(sample, references=given)


def test_real_clips_show_what_was_asked_for(real: dict[str, float]) -> None:
    assert real["identity_proxy"] > 0.6
    assert real["confusion_proxy"] < 0.1
    assert real["found_proxy"] > 0.97
    assert real["entities_proxy"] < 0.25
    assert real["motion_proxy"] > 0.95
    assert real["frechet"] == pytest.approx(0.0, abs=1e-6)


def test_swapped_references_are_confusion(measure: Measure, real: dict[str, float]) -> None:
    swapped = measure(samples=[with_references_of(s, s, 1) for s in SAMPLES])
    assert swapped["confusion_proxy"] > 0.9
    assert swapped["identity_proxy"] < real["identity_proxy"] - 0.3
    # the pictures are the same, only whose they are has changed
    for name in ("copy_paste_proxy", "reference_match_proxy", "found_proxy"):
        assert swapped[name] == pytest.approx(real[name])


def test_references_of_another_clip_lower_identity(
    measure: Measure, real: dict[str, float]
) -> None:
    others = [*SAMPLES[1:], SAMPLES[0]]
    strange = measure(
        samples=[with_references_of(s, o) for s, o in zip(SAMPLES, others, strict=True)]
    )
    assert strange["identity_proxy"] < real["identity_proxy"] - 0.3
    assert strange["reference_match_proxy"] < real["reference_match_proxy"] - 0.1


def test_a_pasted_reference_is_copy_paste_though_identity_likes_it(
    measure: Measure, real: dict[str, float]
) -> None:
    def pasted(sample: Sample) -> Tensor:
        video = torch.full_like(sample.video_THWC, 120)
        for place, reference in zip((0, 32), sample.references[:2], strict=False):
            layers = torch.cat(
                [reference.image_HWC.permute(2, 0, 1), reference.mask_HW[None] * 255]
            )
            small = F.interpolate(layers[None].float(), (32, 32), mode="bilinear", antialias=True)
            on = small[0, 3] > 127
            there = video[:, place : place + 32, place : place + 32]
            there[:, on] = small[0, :3].permute(1, 2, 0).round().byte()[on]
        return video

    two = [dataclasses.replace(s, references=s.references[:2]) for s in SAMPLES]
    before, after = measure(samples=two), measure(pasted, samples=two)
    assert after["copy_paste_proxy"] > 0.85
    assert before["copy_paste_proxy"] < 0.6
    assert after["identity_proxy"] > before["identity_proxy"] - 0.05


def test_an_empty_scene_has_no_identity(measure: Measure) -> None:
    empty = measure(lambda s: torch.full_like(s.video_THWC, 120))
    assert empty["identity_proxy"] == empty["found_proxy"] == empty["motion_proxy"] == 0.0
    assert empty["entities_proxy"] == pytest.approx(
        sum(len(s.entities) for s in SAMPLES) / len(SAMPLES)
    )
    assert "confusion_proxy" not in empty, "nothing was shown that could be confused"
    assert empty["copy_paste_proxy"] == 0.0
    assert empty["flicker"] == 1.0 and empty["motion_amplitude"] == 0.0


def test_a_faded_clip_has_less_contrast_and_colour_and_one_under_a_red_lamp_a_cast(
    measure: Measure, real: dict[str, float]
) -> None:
    assert real["colour_cast"] == 0.0
    faded = measure(lambda s: (s.video_THWC * 0.5 + 64).byte())
    for name in ("contrast", "colourfulness"):
        assert faded[name] == pytest.approx(0.5 * real[name], rel=0.02)

    def red(sample: Sample) -> Tensor:
        return (sample.video_THWC + torch.tensor([40, 0, 0])).clamp(0, 255).byte()

    assert 5 < faded["colour_cast"] < measure(red)["colour_cast"]
    # clips of any colours, as long as they are right on average
    shown = [SAMPLES[1], SAMPLES[0], *SAMPLES[2:]]
    order = iter(shown)
    assert measure(lambda s: next(order).video_THWC)["colour_cast"] == pytest.approx(0, abs=1e-9)


def test_time_reversed_clips_move_against_the_caption(measure: Measure) -> None:
    backwards = measure(lambda s: s.video_THWC.flip(0))
    assert backwards["motion_proxy"] < 0.1
    assert backwards["frechet"] == pytest.approx(0.0, abs=1e-6), "frames are the same"


def test_shuffled_pictures_are_far_from_real_ones(measure: Measure, real: dict[str, float]) -> None:
    def shuffled(sample: Sample) -> Tensor:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        blocks = sample.video_THWC.unflatten(2, (8, 8)).unflatten(1, (8, 8))  # T y h x w C
        blocks = blocks.permute(1, 3, 0, 2, 4, 5).flatten(0, 1)[order].unflatten(0, (8, 8))
        rows: Tensor = blocks.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        return rows.flatten(1, 2)

    def noisy(sample: Sample) -> Tensor:
        noise = torch.randn(sample.video_THWC.shape, generator=torch.Generator().manual_seed(0))
        return (sample.video_THWC + 15 * noise).clamp(0, 255).byte()

    worse, little = measure(shuffled)["frechet"], measure(noisy)["frechet"]
    assert real["frechet"] < little < worse


OF_SUBJECTS = {
    "found_proxy",
    "entities_proxy",
    "motion_proxy",
    "identity_proxy",
    "confusion_proxy",
}


def test_other_data_leaves_out_what_needs_the_shapes_world(measure: Measure) -> None:
    found = measure(subjects_by_colour=False)
    assert found.keys() == GENERATION_METRICS.keys() - OF_SUBJECTS


def test_without_teacher_or_references_the_rest_is_measured(
    measure: Measure, real: dict[str, float]
) -> None:
    bare = [dataclasses.replace(s, references=()) for s in SAMPLES]
    of_references = {"copy_paste_proxy", "reference_match_proxy"}
    without = GENERATION_METRICS.keys() - OF_SUBJECTS - of_references
    assert measure(samples=bare, subjects_by_colour=False).keys() == without
    plain = measure(features=None)
    needs_features = {"identity_proxy", "confusion_proxy", "reference_match_proxy", "frechet"}
    assert plain.keys() == real.keys() - needs_features
    assert all(plain[name] == real[name] for name in plain)


def test_a_single_frame_neither_flickers_nor_moves(
    measure: Measure, real: dict[str, float]
) -> None:
    still = measure(lambda s: s.video_THWC[:1])
    assert still.keys() == real.keys() - {"flicker", "motion_amplitude", "motion_proxy"}


def test_one_reference_cannot_be_confused(measure: Measure) -> None:
    alone = [dataclasses.replace(s, references=s.references[:1]) for s in SAMPLES[:2]]
    found = measure(samples=alone)
    assert "identity_proxy" in found and "confusion_proxy" not in found


def test_a_cutout_looks_like_a_reference() -> None:
    sample = SAMPLES[0]
    assert sample.masks_ETHW is not None
    image, mask = cutout(sample.video_THWC[4], sample.masks_ETHW[0, 4], sample.references[0])
    assert image.shape == (64, 64, 3) and mask.shape == (64, 64)
    extent = mask.any(0).sum(), mask.any(1).sum()
    assert abs(int(max(extent)) - 51) <= 1, "as large as a reference's subject"
    assert (image[~mask].float().mean() > 230) and (image[0, 0] == 255).all()
