"""What a step trains on: the same bits for every variant of a seed."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignlab.config.parts import FlowConfig
from alignlab.config.run import RunConfig
from alignlab.data.registry import build_dataset
from alignlab.recipe import load_run
from alignlab.train import RunTrainer
from alignlab.training.batches import Batch, ClipEncoder, training_batch
from alignlab.training.clip_memory import ClipMemory, tensor_bytes
from alignlab.training.setup import Run, build_run
from alignlab.training.step_terms import SampleTerms
from made_clips import uncached

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def run(recipe_file: Path) -> Run:
    return build_run(load_run(recipe_file, ["data.references=[0,3]"]))


def samples_of(batches: Iterable[Batch]) -> list[dict[str, object]]:
    """Every sample of the batches as its own fields, and the pixels of its clip."""
    return [
        {
            field.name: getattr(batch, field.name)[i]
            for field in fields(batch)
            # what a variant reads of them
            if field.name not in ("clips", "loaded", "cleaner_B", "second", "step_sigma_S")
        }
        | {"video_THWC": batch.clips[i].sample.video_THWC, "mask": batch.reference_masks[i]}
        for batch in batches
        for i in range(len(batch.sigma_B))
    ]


def same(one: Iterable[Batch], two: Iterable[Batch]) -> bool:
    """Whether the batches hold the same samples, bit by bit, in the same order."""
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for left, right in zip(samples_of(one), samples_of(two), strict=True)
        for a, b in zip(left.values(), right.values(), strict=True)
    )


def keys_of(batch: Batch) -> list[str]:
    return [clip.pixels.key for clip in batch.clips]


def batch_of(run: Run, step: int, *, seed: int = 0, samples: range = range(2)) -> Batch:
    return training_batch(run.clips, run.config.flow, seed=seed, step=step, samples=samples)


def test_variants_of_a_seed_train_on_the_same_bits(make_config: MakeConfig) -> None:
    plain = build_run(make_config("name=none", "optim.lr=0.5", aligned=False))
    other = ["name=repa", "objectives.ra={name: repa, teacher: dino, blocks: [3]}"]
    torch.manual_seed(7)  # whatever else was drawn in the process
    repa = build_run(make_config(*other))
    for step in range(3):
        plain.state.step = repa.state.step = step
        assert same(RunTrainer(plain).micro_batches(), RunTrainer(repa).micro_batches())


def test_another_seed_draws_other_clips_noise_levels_and_dropouts(run: Run) -> None:
    one = [batch_of(run, step, samples=range(8)) for step in range(3)]
    two = [batch_of(run, step, seed=1, samples=range(8)) for step in range(3)]
    assert not any(torch.equal(a.noise_BCTHW, b.noise_BCTHW) for a, b in zip(one, two, strict=True))
    assert not any(torch.equal(a.sigma_B, b.sigma_B) for a, b in zip(one, two, strict=True))
    assert any(keys_of(a) != keys_of(b) for a, b in zip(one, two, strict=True))


def test_steps_and_samples_draw_apart(run: Run) -> None:
    one, two = batch_of(run, 0), batch_of(run, 1)
    noises = [*one.noise_BCTHW, *two.noise_BCTHW]
    assert len({float(noise.sum()) for noise in noises}) == 4
    assert len({float(sigma) for sigma in [*one.sigma_B, *two.sigma_B]}) == 4


def test_accumulation_rounds_change_nothing_that_is_drawn(make_config: MakeConfig) -> None:
    whole = build_run(make_config("optim.batch_size=4"))
    split = build_run(make_config("optim.batch_size=4", "optim.accumulate=2", "name=split"))
    together, rounds = RunTrainer(whole).micro_batches(), RunTrainer(split).micro_batches()
    assert [len(batch.sigma_B) for batch in together] == [4]
    assert [len(batch.sigma_B) for batch in rounds] == [2, 2]
    assert same(together, rounds)


def test_a_cached_clip_is_bitwise_the_uncached_one(run: Run) -> None:
    config = run.config.data.model_copy(update={"references": (0, 3)})
    dataset = build_dataset(config, "train")
    fresh = ClipEncoder(run.wan.frozen, dataset, uncached(), ClipMemory(0))
    of_two = 2 * tensor_bytes(fresh[0]) + 1
    cached = ClipEncoder(run.wan.frozen, dataset, uncached(), ClipMemory(of_two))
    for index in (0, 1, 2, 0, 2, 1):  # 0 is dropped from the cache and comes back
        for clips in (cached, fresh):
            clips[index]
        one, two = cached[index], fresh[index]
        for name in ("latents_CTHW", "text_LD", "references_KCHW"):
            assert torch.equal(getattr(one, name), getattr(two, name))
        assert one.sample.key == two.sample.key
    assert cached[1] is cached[1]
    assert fresh[1] is not fresh[1]


def test_dropped_conditions_are_empty_text_and_no_references(run: Run) -> None:
    everything = {"text_dropout": 0.0, "reference_dropout": 0.0, "both_dropout": 0.0}
    kept = {}
    for case, probability in (
        ("none", {}),
        ("text", {"text_dropout": 1.0}),
        ("references", {"reference_dropout": 1.0}),
        ("both", {"both_dropout": 1.0}),
    ):
        flow = FlowConfig.model_validate({**everything, **probability})
        kept[case] = training_batch(run.clips, flow, seed=0, step=0, samples=range(8))
    full = kept["none"]
    assert sum(len(r) for r in full.references) > 0
    empty = run.clips.empty_text_LD
    for case, batch in kept.items():
        assert torch.equal(batch.latents_BCTHW, full.latents_BCTHW)
        no_text = case in ("text", "both")
        assert all(torch.equal(text, empty) == no_text for text in batch.text_BLD)
        gone = case in ("references", "both")
        for one, all_of_them in zip(batch.references, full.references, strict=True):
            assert torch.equal(one, all_of_them[:0] if gone else all_of_them)
        for masks, latents, names in zip(
            batch.reference_masks, batch.references, batch.names, strict=True
        ):
            assert len(masks) == len(latents) == len(names)


def test_conditions_are_dropped_as_often_as_asked(run: Run) -> None:
    flow = FlowConfig(text_dropout=0.1, reference_dropout=0.2, both_dropout=0.3)
    clips = ClipEncoder(
        run.wan.frozen, build_dataset(run.config.data, "train"), uncached(), ClipMemory()
    )
    counts = {(text, references): 0 for text in (True, False) for references in (True, False)}
    total = 0
    for step in range(40):
        batch = training_batch(clips, flow, seed=0, step=step, samples=range(20))
        full = training_batch(
            clips,
            FlowConfig(text_dropout=0, reference_dropout=0, both_dropout=0),
            seed=0,
            step=step,
            samples=range(20),
        )
        for i in range(20):
            if len(full.references[i]):  # of a clip without any it cannot be seen
                text = torch.equal(batch.text_BLD[i], full.text_BLD[i])
                counts[text, len(batch.references[i]) > 0] += 1
                total += 1
    share = {case: count / total for case, count in counts.items()}
    assert share[False, True] == pytest.approx(0.1, abs=0.04)
    assert share[True, False] == pytest.approx(0.2, abs=0.05)
    assert share[False, False] == pytest.approx(0.3, abs=0.05)


def test_clips_are_drawn_evenly(run: Run) -> None:
    counts = [0] * len(run.clips)
    keys = [run.clips[i].pixels.key for i in range(len(run.clips))]
    for step in range(60):
        for drawn in keys_of(batch_of(run, step, samples=range(10))):
            counts[keys.index(drawn)] += 1
    assert all(0.5 < count / (600 / len(counts)) < 1.5 for count in counts)


def test_pictures_of_a_cached_clip_are_not_looked_at_again(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(make_config("data.references=[3,3]", "flow.both_dropout=0"))
    first = batch_of(run, 0)
    assert first.referenced_B.any()
    monkeypatch.setattr("alignlab.training.batches.is_blank", None)
    assert same([first], [batch_of(run, 0)])


def test_a_step_has_one_micro_batch_in_memory(make_config: MakeConfig) -> None:
    run = build_run(make_config("optim.batch_size=4", "optim.accumulate=4"))
    trainer = RunTrainer(run)
    earlier: list[weakref.ref[Batch]] = []

    def making() -> AbstractContextManager[None]:
        assert not [batch for batch in earlier if batch() is not None]
        return nullcontext()

    forward = trainer.losses

    def losses(batch: Batch) -> tuple[Tensor, SampleTerms]:
        assert batch.loaded
        earlier.append(weakref.ref(batch))
        return forward(batch)

    trainer.losses = losses  # type: ignore[method-assign]
    with run.branch:
        trainer.step(trainer.micro_batches().within(making))
    assert len(earlier) == 4


def test_micro_batches_that_a_diagnosis_reads_are_without_features(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = RunTrainer(build_run(make_config("optim.batch_size=4", "optim.accumulate=2")))
    assert all(batch.loaded for batch in trainer.micro_batches())
    monkeypatch.setattr(trainer, "is_diagnosis_due", lambda step: True)
    assert not any(batch.loaded for batch in trainer.micro_batches())
