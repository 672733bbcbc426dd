"""What `alignlab.attach` and its object refuse, in one line that names the thing and the fix."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from alignlab import attach
from alignlab.teachers import DiffusionTeacher
from alignlab.training.aligned_samples import STOP_AT_EXPECTED
from alignlab.training.step_terms import Aligned
from attached_objectives import (
    FRAMES,
    IMAGES,
    REFALIGN,
    REPA,
    TEXT,
    Attach,
    Colours,
    clips,
    refused,
    run,
)


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        ({}, "objectives: none is given"),
        ({"a": {**REPA, "name": "rapa"}}, r"objectives\.a\.name: unknown .* did you mean 'repa'"),
        ({"a": {**REPA, "wieght": 1}}, r"objectives\.a\.wieght: unknown key .* 'weight'"),
        ({"a b": REPA}, "objectives, teachers: 'a b' holds ' '"),
        ({"a": {**REPA, "blocks": [2]}}, r"objectives\.a\.blocks: block 2 does not exist"),
        (
            {"a": {**REPA, "teacher": "dino"}},
            r"objectives\.a\.teacher: unknown .*'dino', valid: mine",
        ),
        ({"a": REFALIGN}, r"objectives\.a: refalign aligns reference tokens: say where"),
        ({"a": {**REPA, "schedule": "linear"}}, r"objectives\.a\.schedule: linear .*total_steps"),
        (
            {"a": {**REPA, "schedule": {"kind": "stop_at", "step": 0}}},
            r"objectives\.a\.schedule: it stops at step 0",
        ),
        (
            {"a": {**REPA, "weight": {"gradient_share": 0.1}}},
            r"objectives\.a\.weight: gradient_share needs the flow loss, .*; give a number",
        ),
        (
            {"a": {"name": "moalign", "teacher": "mine", "blocks": [0], "head": "nowhere"}},
            r"objectives\.a: .*nowhere",
        ),
    ],
)
def test_objectives_that_cannot_work(
    objectives: dict[str, Any], expected: str, attached: Attach, transformer: nn.Module
) -> None:
    with refused(expected):
        attached(**objectives)
    assert not any(module._forward_hooks for module in transformer.modules())


@pytest.mark.parametrize(
    ("teachers", "expected"),
    [
        ({"mine": nn.Linear(2, 2)}, r"teachers\.mine: Linear is no teacher"),
        ({"mine": {"family": "dinov9"}}, r"teachers\.mine\.family: unknown .*did you mean"),
        ({"mine": {"family": "dinov2", "path": "no/where"}}, r"teachers \(dinov2\) path: no/where"),
        ({"mine": {"family": "diffusion"}}, r"teachers\.mine: family diffusion reads latents"),
        (
            {"mine": DiffusionTeacher.__new__(DiffusionTeacher)},
            r"teachers\.mine: a DiffusionTeacher reads latents",
        ),
        ({"mine": {"family": "tiny-dino", "shuffle": True}}, r"teachers\.mine\.shuffle: takes"),
        ({"mine": Colours(), "other": Colours()}, r"teachers\.other: no objective reads it"),
        ({}, r"objectives\.a\.teacher: unknown teacher 'mine'"),
    ],
)
def test_teachers_that_cannot_work(
    teachers: dict[str, Any], expected: str, transformer: nn.Module
) -> None:
    with refused(expected):
        attach(transformer, objectives={"a": REPA}, teachers=teachers)


def test_a_video_teacher_has_no_features_of_references(attached: Attach) -> None:
    with refused(r"objectives\.a\.teacher: mine takes whole clips"):
        attached(teacher=Colours(is_video=True), references="after", a=REFALIGN)


def test_a_video_teacher_needs_more_frames(attached: Attach, transformer: nn.Module) -> None:
    alignment = attached(teacher=Colours(is_video=True), a=REPA)
    run(alignment, transformer)
    with refused(r"Clips\.frames_BTHWC: a video teacher needs 9 frames or more, not 5"):
        alignment(clips(), 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (nn.Linear(2, 2), "transformer: Linear holds 0 models of WanTransformer3DModel or"),
        ("transformer", "transformer: str is no torch module"),
    ],
)
def test_what_is_no_wan_transformer(given: Any, expected: str) -> None:
    with refused(expected):
        attach(given, objectives={"a": REPA}, teachers={"mine": Colours()})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sigma_B": torch.tensor([0.2, 731.0])}, r"Clips\.sigma_B: 731 is no noise level"),
        ({"sigma_B": torch.tensor([1, 0])}, r"Clips\.sigma_B: expected .*, got int64 \(2,\)"),
        ({"latent_shape": (4, 4)}, r"Clips\.latent_shape: expected \(frames, height, width\)"),
        ({"frames_BTHWC": FRAMES.float()}, r"Clips\.frames_BTHWC: expected uint8 .* got float32"),
        (
            {"frames_BTHWC": FRAMES.movedim(4, 1)},
            r"Clips\.frames_BTHWC: .*, got uint8 \(2, 3, 5, 32, 32\)",
        ),
        ({"frames_BTHWC": FRAMES[:1]}, r"Clips\.frames_BTHWC: .*, got uint8 \(1, 5, 32, 32, 3\)"),
        (
            {"frames_BTHWC": FRAMES[:, :4], "latent_shape": (3, 4, 4)},
            r"Clips\.frames_BTHWC: 4 frames are not those of 3 latent frames: .* 9 for Wan's",
        ),
        ({"latent_shape": (1, 4, 4)}, r"Clips\.frames_BTHWC: 5 frames are not those of 1 latent"),
        ({"names": [["a"], []]}, r"Clips\.names: there are no references"),
        ({"references": [IMAGES]}, r"Clips\.references: 1 samples, and sigma_B has 2"),
        ({"references": [IMAGES[0], None]}, r"Clips\.references\[0\]: expected uint8 \(K, H, W, 3"),
        (
            {"references": [IMAGES, None], "names": [["a", "b"], []]},
            r"Clips\.names\[0\]: 2 names, and the sample has 1 references",
        ),
        (
            {"references": [IMAGES, None], "reference_masks": [None, None]},
            r"Clips\.reference_masks\[0\]: None, and the sample has 1 references",
        ),
        ({"masks_BTHW": FRAMES[..., 0]}, r"Clips\.masks_BTHW: expected bool .* with T=5"),
        (
            {"undecided_BTHW": FRAMES[..., 0] > 0},
            r"Clips\.undecided_BTHW: says nothing without masks_BTHW",
        ),
        (
            {"masks_BTHW": FRAMES[..., 0] > 0, "undecided_BTHW": FRAMES[:, 1:, ..., 0] > 0},
            r"Clips\.undecided_BTHW: expected bool .*, as masks_BTHW",
        ),
        ({"text_BLD": TEXT[0]}, r"Clips\.text_BLD: expected floating \(B, L, D\)"),
    ],
)
def test_clips_that_are_no_clips(fields: dict[str, Any], expected: str) -> None:
    with refused(expected):
        clips(**fields)


@pytest.mark.parametrize(
    ("settings", "frames", "fields", "expected"),
    [
        (REPA, 2, {"frames_BTHWC": None}, r"objectives\.a: repa reads Clips\.frames_BTHWC"),
        (REFALIGN, 3, {}, r"objectives\.a: refalign reads Clips\.references"),
        (
            REFALIGN | {"foreground": 0.5},
            3,
            {"references": [IMAGES, IMAGES]},
            r"objectives\.a: refalign reads Clips\.reference_masks",
        ),
        (
            {**REPA, "name": "sara", "saliency": "masks"},
            2,
            {},
            r"objectives\.a: sara reads Clips\.masks_BTHW",
        ),
        (
            REFALIGN,
            3,
            {"references": [FRAMES[0, :2], None]},
            r"Clips\.references\[0\]: 2 pictures, .* has 1 latent frames",
        ),
        (REPA, 2, {"latent_shape": (5, 4, 4)}, r"Clips\.latent_shape: the video has 5x2x2 tokens"),
        (REPA, 2, {"latent_shape": (2, 4, 5)}, r"Clips\.latent_shape: 4x5 does not divide"),
    ],
)
def test_clips_that_do_not_go_with_the_forward_pass(
    settings: dict[str, Any],
    frames: int,
    fields: dict[str, Any],
    expected: str,
    attached: Attach,
    transformer: nn.Module,
) -> None:
    alignment = attached(references="after" if settings["name"] == "refalign" else None, a=settings)
    run(alignment, transformer, frames=frames)
    with refused(expected):
        alignment(clips(**fields), 0)


def test_reference_frames_that_nobody_spoke_of(attached: Attach, transformer: nn.Module) -> None:
    alignment = attached(a=REPA)
    run(alignment, transformer, frames=3)
    with refused(r"Clips\.latent_shape: the video has 2x2x2 tokens, and .* sequence 12; .*after"):
        alignment(clips(), 0)


def test_a_forward_pass_that_was_not_recorded(attached: Attach, transformer: nn.Module) -> None:
    alignment = attached(a=REPA)
    with refused("no forward pass was recorded"):
        alignment(clips(), 0)
    with alignment.recording():
        pass
    with refused("no forward pass was recorded"):
        alignment(clips(), 0)
    run(alignment, transformer)
    alignment(clips(), 0)
    with refused("no forward pass was recorded"):
        alignment(clips(), 0)  # twice of one
    run(alignment, transformer, batch=3)
    with refused(r"Clips\.sigma_B: 2 samples, and 3 went through the transformer"):
        alignment(clips(), 0)
    alignment.detach()
    with refused("alignment is detached"):
        run(alignment, transformer)


@pytest.mark.parametrize("step", [-1, 1.0, None, True])
def test_a_step_is_a_count(step: Any, attached: Attach, transformer: nn.Module) -> None:
    alignment = attached(a=REPA)
    run(alignment, transformer)
    with refused("step: .* is no number of optimizer steps"):
        alignment(clips(), step)
    with refused("clips: expected alignlab.Clips, got dict"):
        alignment({}, 0)


def test_tokens_without_a_gradient_train_the_projector_alone(
    attached: Attach, transformer: WanTransformer3DModel
) -> None:
    alignment = attached(a=REPA)
    with torch.no_grad():
        run(alignment, transformer)
    with refused(r"objectives\.a: the tokens of block 1 carry no gradient"):
        alignment(clips(), 0)
    with torch.no_grad():  # as in a validation
        run(alignment, transformer)
        alignment(clips(), 0)


def test_a_plateau_that_is_shown_nothing(attached: Attach, transformer: nn.Module) -> None:
    alignment = attached(a=REPA | {"schedule": "stop_at_plateau"})
    for _ in range(2):  # two micro-batches
        run(alignment, transformer)
        aligned = alignment(clips(), 0)
    run(alignment, transformer)
    with refused("step 0 was not shown to stop_at_plateau: call alignment.step_done"):
        alignment(clips(), 1)
    for step, results in ((1, [aligned]), (0, [])):
        with refused(f"step_done: {step} with {len(results)} results; give the step"):
            alignment.step_done(step, *results)
    alignment.step_done(0, aligned)
    with torch.no_grad():  # a validation is no step
        run(alignment, transformer)
        alignment(clips(), 1)
    run(alignment, transformer)
    alignment(clips(), 1)


@pytest.mark.parametrize("schedule", [{}, {"schedule": "stop_at_plateau"}])
def test_a_step_is_shown_once_and_by_its_number(
    schedule: dict[str, Any], attached: Attach, transformer: nn.Module
) -> None:
    alignment = attached(a=REPA | schedule)
    run(alignment, transformer)
    with torch.no_grad():
        validated = alignment(clips(), 0)
    run(alignment, transformer)
    results: list[Aligned] = []

    def refuses(*steps: Any) -> None:
        state = {name: value.clone() for name, value in alignment.state_dict().items()}
        for step in steps:
            with refused(f"step_done: {step} with 1 results; give the step"):
                alignment.step_done(step, *(results or [validated]))
        for name, value in alignment.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)

    refuses(0)  # nothing but a validation
    results.append(alignment(clips(), 1))
    refuses(0, 2, True, 1.0, None)
    alignment.step_done(1, *results)
    refuses(1, 7, -3, True)


def test_an_objective_that_aligns_nothing_ends_the_training(
    attached: Attach, transformer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("alignlab.training.aligned_samples.warn_once", said.append)
    blank = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    alignment = attached(references="after", a=REFALIGN, b=REPA)
    nothing = clips(references=[None, blank])
    for step in range(STOP_AT_EXPECTED // 2 - 1):
        if step < 2:  # what the transformer gives then is enough
            run(alignment, transformer, frames=3)
            aligned = alignment(nothing, step)
        else:
            alignment._seen.see(aligned)
    with torch.no_grad():  # a validation counts for nothing
        run(alignment, transformer, frames=3)
        alignment(nothing, step)
    alignment.detach()
    (text,) = said
    assert text.startswith("objectives.a: none of 998 samples had anything to align")
    alignment.attach()
    run(alignment, transformer, frames=3)
    with refused(r"objectives\.a: none of 1,000 samples had anything to align"):
        alignment(nothing, step)
    some = attached(references="after", a=REFALIGN)
    run(some, transformer, frames=3)
    some(clips(references=[None, IMAGES]), 0)
    some.detach()
    assert len(said) == 1


def test_one_of_several_ranks_warns_of_its_own_samples(
    attached: Attach, transformer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it raised, the others would wait for it in their next all-reduce."""
    said: list[str] = []
    monkeypatch.setattr("alignlab.training.aligned_samples.warn_once", said.append)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("alignlab.training.aligned_samples.STOP_AT_EXPECTED", 4)
    alignment = attached(references="after", a=REFALIGN | {"negatives": "sample"})
    for step in range(3):
        run(alignment, transformer, frames=3)
        alignment(clips(references=[None, torch.zeros_like(IMAGES)]), step)
        assert len(said) == (step > 0)
    alignment.detach()
    (text,) = said
    assert text.startswith("objectives.a: none of 4 samples of rank 1 had anything to align")


def test_several_ranks_do_not_share_a_batch_that_is_compared(
    attached: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with refused(r"objectives\.a: it compares the samples of a batch, which 2 ranks"):
        attached(references="after", a=REFALIGN | {"negatives": "batch"})
