"""The loss of one batch: which samples count in what, and how terms add up."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.kernels.pull_push import pull_push
from alignlab.losses import build_objective
from alignlab.losses.objective import Terms
from alignlab.losses.repa import Repa
from alignlab.losses.sara import SaraConfig
from alignlab.train import RunTrainer
from alignlab.training.batch_context import BatchContext
from alignlab.training.batches import Batch, collate
from alignlab.training.encoded import Encoded
from alignlab.training.setup import Run, build_run
from made_clips import decoded_pixels, uncached

MakeConfig = Callable[..., RunConfig]

# REPA's own projector is 2048 wide: too slow for a test
REPA_SMALL = (
    "objectives.repa.name=repa",
    "objectives.repa.teacher=dino",
    "objectives.repa.blocks=[3]",
    "objectives.repa.projector_dim=32",
)


def with_references(clip: Encoded, count: int) -> Encoded:
    sample = replace(clip.sample, references=clip.sample.references[:count])
    return replace(
        clip,
        pixels=decoded_pixels(sample),
        references_KCHW=clip.references_KCHW[:count],
        values=uncached(),
    )


def batch_with(run: Run, counts: list[int], rows: list[int]) -> Batch:
    """Clip i with `counts[i]` references, for every i of `rows`, at its own noise."""
    clips = [with_references(run.clips[i], counts[i]) for i in rows]
    rng = [torch.Generator().manual_seed(i) for i in rows]
    noise = [
        torch.randn(c.latents_CTHW.shape, generator=g) for c, g in zip(clips, rng, strict=True)
    ]
    sigma = [0.2 + 0.2 * i for i in rows]
    return collate(
        clips,
        noise,
        sigma,
        [(True, True)] * len(rows),
        run.clips.empty_text_LD,
    )


@pytest.mark.parametrize("text_to_references", ["true", "false"])
def test_samples_with_and_without_references_share_a_batch(
    make_config: MakeConfig, text_to_references: str
) -> None:
    config = make_config(
        *REPA_SMALL,
        "data.references=[3,3]",
        "flow.weighting=wan_gaussian",
        "objectives.ra.gate=t^3",
        "objectives.ra.weight=0.7",
        f"model.text_to_references={text_to_references}",
    )
    run = build_run(config)
    counts = [0, 3, 1, 2]
    with run.branch, torch.no_grad():
        together, found = RunTrainer(run).losses(batch_with(run, counts, [0, 1, 2, 3]))
        alone = [RunTrainer(run).losses(batch_with(run, counts, [i])) for i in range(4)]
    assert all(torch.isfinite(value).all() for value in found.values())
    torch.testing.assert_close(
        together, torch.stack([total for total, _ in alone]).mean(), rtol=1e-5, atol=1e-6
    )
    for name in ("loss/flow", "loss/ra", "loss/ra/pull", "loss/ra/push", "loss/repa"):
        each = torch.cat([row[name] for _, row in alone])
        torch.testing.assert_close(found[name], each, rtol=1e-5, atol=1e-6)
    bare = alone[0][1]
    assert bare["loss/ra"] == bare["loss/ra/pull"] == bare["loss/ra/push"] == 0
    assert alone[2][1]["loss/ra/push"] == 0  # nothing to push away from
    # the mean cosine is of the samples that have references
    assert len(bare["sim/ra"]) == 0
    each = torch.cat([row["sim/ra"] for _, row in alone])
    torch.testing.assert_close(found["sim/ra"], each, rtol=1e-5, atol=1e-6)


def test_zeros_in_place_of_references_are_trained_on_and_aligned_to_nothing(
    make_config: MakeConfig,
) -> None:
    counts, rows = [0, 3, 0, 2], [0, 1, 2, 3]
    found = {}
    for absent in ("none", "zero"):
        config = make_config(
            "data.references=[3,3]", f"model.absent_references={absent}", *REPA_SMALL
        )
        run = build_run(config)
        with run.branch, torch.no_grad():
            found[absent] = RunTrainer(run).losses(batch_with(run, counts, rows))[1]
    none, zero = found["none"], found["zero"]
    for name in ("loss/flow", "loss/repa"):  # the video attends to the zeros
        changed = (zero[name] - none[name]).abs() > 1e-4
        assert changed.tolist() == [True, False, True, False]
    for name in ("loss/ra", "loss/ra/pull", "loss/ra/push", "sim/ra"):
        torch.testing.assert_close(zero[name], none[name], rtol=1e-5, atol=1e-6)
    assert zero["loss/ra"][0] == zero["loss/ra"][2] == 0 and len(zero["sim/ra"]) == 2


def test_foreground_tokens_are_those_that_the_reference_mask_covers(
    make_config: MakeConfig,
) -> None:
    config = make_config("data.references=[3,3]", "objectives.ra.foreground=0.5")
    run = build_run(config)
    batch = batch_with(run, [0, 2, 3], [0, 1, 2])
    found = BatchContext(batch, (3, 4, 4)).of(run.alignment.objectives["ra"]).foreground_BN
    assert found is not None and found.shape == (3, 48)
    assert (found[0] == 0).all() and (found[1, 32:] == 0).all()
    mask_HW = run.clips[1].sample.references[1].mask_HW
    tiles = mask_HW.float().unflatten(0, (4, -1)).unflatten(2, (4, -1)).mean((1, 3))
    torch.testing.assert_close(found[1, 16:32].view(4, 4), tiles)
    with run.branch, torch.no_grad():
        _, scalars = RunTrainer(run).losses(batch)
    assert scalars["loss/ra"][0] == 0 and (scalars["loss/ra"][1:] > 0).all()


def test_objectives_are_told_which_pixels_are_undecided() -> None:
    objective = build_objective(
        SaraConfig(teacher="dino", saliency="masks", projector_dim=4),
        student_dim=4,
        teacher_dims={"dino": 4},
    )
    masks: list[Tensor] = [torch.zeros(n, 5, 8, 8, dtype=torch.bool) for n in (1, 2)]
    undecided_THW = torch.zeros(5, 8, 8, dtype=torch.bool)
    undecided_THW[2, 3] = True
    batch: Any = SimpleNamespace(sigma_B=torch.zeros(2), masks=masks, undecided=[None, None])
    assert BatchContext(batch).of(objective).undecided_BTHW is None
    batch.undecided = [None, undecided_THW]
    found = BatchContext(batch).of(objective).undecided_BTHW
    assert found is not None and not found[0].any() and torch.equal(found[1], undecided_THW)


def test_the_total_is_the_weighted_scheduled_gated_sum(make_config: MakeConfig) -> None:
    config = make_config(
        "data.references=[3,3]",
        "steps=10",
        "flow.weighting=wan_gaussian",
        "objectives.ra.gate=t^3",
        "objectives.ra.weight=0.7",
        "objectives.ra.schedule.kind=linear",
    )
    run = build_run(config)
    run.state.step = 5
    batch = batch_with(run, [2, 3], [1])
    with run.branch, torch.no_grad():
        total, found = RunTrainer(run).losses(batch)
    expected = run.flow_weights(batch.sigma_B) * found["loss/flow"]
    expected = expected + 0.7 * 0.5 * batch.sigma_B**3 * found["loss/ra"]
    torch.testing.assert_close(total, expected.mean())


def test_a_warmup_multiplies_the_schedule_and_is_logged(make_config: MakeConfig) -> None:
    ramp = "objectives.ra.schedule={kind: linear, start: 0, end: 10}"
    run = build_run(make_config("data.references=[3,3]", ramp, "objectives.ra.warmup=4"))
    plain = build_run(make_config("data.references=[3,3]"))
    batch = batch_with(run, [2], [0])
    for step, factor in ((0, 0.25), (2, 0.8 * 0.75), (3, 0.7), (6, 0.4)):
        run.state.step = step
        with run.branch, torch.no_grad():
            found = RunTrainer(run).forward(batch)[1]
        with plain.branch, torch.no_grad():
            whole = RunTrainer(plain).forward(batch)[1]
        torch.testing.assert_close(found.loss, factor * whole.loss)
        assert run.alignment.weights.factors(step) == pytest.approx({"ra": factor})
    with run.branch:
        scalars = RunTrainer(run).step([batch])
    assert float(scalars["schedule/ra"]) == pytest.approx(0.4)


def without_subjects(batch: Batch, rows: list[int]) -> Batch:
    """The batch with reference masks of these rows that show nothing of their subjects."""
    masks = list(batch.reference_masks)
    for row in rows:
        masks[row] = torch.zeros_like(masks[row])
    other = replace(batch)
    vars(other)["reference_masks"] = masks  # as if they had been read
    return other


WATCHED = "{kind: stop_at_plateau, decay: 0.0, patience: 9}"


def test_references_that_show_too_little_are_in_no_average(make_config: MakeConfig) -> None:
    foreground = ["data.references=[3,3]", "objectives.ra.foreground=0.5"]
    run = build_run(make_config(*foreground, f"objectives.ra.schedule={WATCHED}", "optim.lr=1e-9"))
    whole = batch_with(run, [1, 2, 3, 0], [0, 1, 2, 3])
    with run.branch, torch.no_grad():
        _, full = RunTrainer(run).losses(whole)
        _, found = RunTrainer(run).losses(without_subjects(whole, [1]))
        _, nothing = RunTrainer(run).losses(without_subjects(whole, [0, 1, 2]))
    assert len(full["sim/ra"]) == 3 and (full["sim/ra"] != 0).all()
    torch.testing.assert_close(found["sim/ra"], full["sim/ra"][[0, 2]])
    assert torch.equal(found["watched/ra"], found["sim/ra"])
    assert len(found["loss/ra"]) == 4 and found["loss/ra"][1] == 0
    assert len(nothing["sim/ra"]) == len(nothing["watched/ra"]) == 0
    # over micro-batches, each sample that is aligned counts the same
    rounds = [
        without_subjects(batch_with(run, [1, 2, 3, 0], rows), hidden)
        for rows, hidden in (([0, 1], [1]), ([2], []), ([3], []), ([1], [0]))
    ]
    with run.branch:
        scalars = RunTrainer(run).step(rounds)
    torch.testing.assert_close(scalars["sim/ra"], found["sim/ra"].mean())
    torch.testing.assert_close(
        run.alignment.weights.watches["ra"].average.float(), scalars["sim/ra"]
    )


def test_what_an_objective_calls_aligned_is_what_a_plateau_sees(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Repa.forward

    def half(*args: Any) -> Terms:
        aligned_B = torch.tensor([False, True])
        return replace(forward(*args), similarity_B=None, aligned_B=aligned_B)

    monkeypatch.setattr(Repa, "forward", half)
    run = build_run(make_config(*REPA_SMALL, f"objectives.repa.schedule={WATCHED}"))
    with run.branch, torch.no_grad():
        _, found = RunTrainer(run).losses(batch_with(run, [0, 0], [0, 1]))
    assert torch.equal(found["watched/repa"], -found["loss/repa"][1:])
    assert "sim/repa" not in found


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_similarities_are_computed_from_tokens_in_the_precision_of_the_run(
    make_config: MakeConfig, precision: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(make_config("data.references=[2,2]", f"model.precision={precision}"))
    seen: list[torch.dtype] = []

    def watched(student: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(student.dtype)
        return pull_push(student, *args, **options)

    monkeypatch.setattr("alignlab.losses.refalign.pull_push", watched)
    with run.branch:
        RunTrainer(run).losses(batch_with(run, [2], [0]))
    assert seen == [getattr(torch, dtype)]
