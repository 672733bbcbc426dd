"""Batches that threads make ahead of a step: the same bits, the same errors, no thread left."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.data.sample import Sample
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.errors import UserError
from alignlab.randomness import generator
from alignlab.teachers import Teacher
from alignlab.train import RunTrainer, train
from alignlab.training.batches import Batch, training_batch
from alignlab.training.micro_batches import MicroBatches
from alignlab.training.prefetch import THREAD_NAME, Prefetch, check_wanted
from alignlab.training.setup import build_run
from host_syncs import META, HostSyncs
from run_contents import timeless_contents, timeless_rows

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]

CPU = torch.device("cpu")
SETTINGS = (
    "steps=4",
    "optim.batch_size=4",
    "optim.accumulate=2",
    "objectives.ra.foreground=1",
    "objectives.ra.schedule={kind: stop_at_plateau, patience: 2, min_delta: 10}",
    "objectives.rp={name: repa, teacher: dino, blocks: [3], projector_dim: 32}",
    "checkpoint.every=2",
    "eval.clips=1",
)
BETWEEN_STEPS = ("eval.every=2", "tracking.diagnose_every=3")


def left_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


def checkpoints(folder: Path) -> dict[str, bytes]:
    return timeless_contents(folder / "checkpoints")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    assert left_threads() == []


def test_a_run_has_the_same_bits_however_its_batches_are_made(make_config: MakeConfig) -> None:
    def run(name: str, *settings: str) -> Path:
        return train(make_config(*SETTINGS, *BETWEEN_STEPS, f"name={name}", *settings))

    plain = run("plain", "data.workers=0", "data.cache.mode=off")
    rows = timeless_rows(plain)
    assert {"grad/ra/ratio", "val/flow", "loss/ra"} <= {key for row in rows for key in row}
    assert "loss/ra" not in rows[-2]  # it has stopped
    for made in (
        run("live", "data.workers=2", "data.prefetch=3", "data.cache.mode=off"),
        run("cold", "data.workers=2", "data.prefetch=3"),
        run("warm", "data.workers=1", "data.prefetch=1"),
    ):
        assert timeless_rows(made) == rows
        assert checkpoints(made) == checkpoints(plain)


def test_a_killed_run_resumes_with_the_bits_of_one_that_made_nothing_ahead(
    make_config: MakeConfig, train_until: TrainUntil
) -> None:
    ahead = ("data.workers=2", "data.prefetch=3")
    train_until(make_config(*SETTINGS, *ahead), 3)
    assert left_threads() == []
    resumed = train(make_config(*SETTINGS, *ahead))
    plain = train(make_config(*SETTINGS, "name=plain"))
    assert timeless_rows(resumed) == timeless_rows(plain)
    assert checkpoints(resumed) == checkpoints(plain)


def test_a_bad_clip_ends_the_run_at_the_step_that_reads_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(step: int) -> set[int]:
        rngs = [generator(0, "clip", step, sample) for sample in range(2)]
        return {int(torch.randint(50, (), generator=rng)) for rng in rngs}

    (bad, *_) = drawn(3) - drawn(0) - drawn(1) - drawn(2)
    decode = ShapesDataset.__getitem__

    def read(dataset: ShapesDataset, index: int) -> Sample:
        if dataset.split == "train" and index == bad:
            raise UserError(f"{dataset.key(index)}: is cut")
        return decode(dataset, index)

    monkeypatch.setattr(ShapesDataset, "__getitem__", read)
    for workers in (0, 1, 2):
        config = make_config(
            f"name=w{workers}", "steps=6", "data.train_clips=50", f"data.workers={workers}"
        )
        with pytest.raises(UserError, match=rf"^shapes-0-train-{bad:06d}: is cut$"):
            train(config)
        assert left_threads() == []
        rows = timeless_rows(Path(config.output, config.name))
        assert [row["step"] for row in rows] == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", ["off", "write"])
def test_the_thread_that_trains_decodes_and_encodes_only_what_comes_first(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    trained, calls = threading.current_thread(), {"clips": 0, "features": 0}
    decode, encode = ShapesDataset.__getitem__, Teacher.encode

    def read(dataset: ShapesDataset, index: int) -> Sample:
        calls["clips"] += threading.current_thread() is trained
        return decode(dataset, index)

    def features(*args: Any) -> Any:
        calls["features"] += threading.current_thread() is trained
        return encode(*args)

    config = make_config(
        *("steps=4", "data.train_clips=50", f"data.cache.mode={mode}", "data.workers=1"),
        *("flow.reference_dropout=0", "flow.both_dropout=0"),
    )
    run = build_run(config)
    monkeypatch.setattr(ShapesDataset, "__getitem__", read)
    monkeypatch.setattr(Teacher, "encode", features)
    with run.branch, prefetch(RunTrainer(run).micro_batches, config) as ahead:
        for step in range(4):
            RunTrainer(run).step(ahead.take(step))
    assert calls == {"clips": 2, "features": 2}


@pytest.mark.parametrize("every", ["eval.every=1", "tracking.diagnose_every=1"])
def test_nothing_is_made_while_a_run_is_evaluated_or_diagnosed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, every: str
) -> None:
    being_made, seen = set[int](), []

    def make(*args: Any, **settings: Any) -> Batch:
        being_made.add(settings["step"])
        time.sleep(0.1)
        made = training_batch(*args, **settings)
        being_made.remove(settings["step"])
        return made

    def look(trainer: RunTrainer, *_: object) -> dict[str, float]:
        seen.append((trainer.state.step, set(being_made)))
        return {}

    monkeypatch.setattr("alignlab.train.training_batch", make)
    monkeypatch.setattr(RunTrainer, "evaluate_now", look)
    monkeypatch.setattr(RunTrainer, "diagnose", look)
    train(make_config("steps=4", every, "eval.clips=1", "data.workers=1", aligned=False))
    assert [step for step, _ in seen] == ([1, 2, 3] if every.startswith("eval") else [0, 1, 2, 3])
    assert not any(steps for _, steps in seen)


def test_pixels_are_decoded_ahead_where_an_objective_needs_masks(make_config: MakeConfig) -> None:
    config = make_config("flow.reference_dropout=0", "flow.both_dropout=0")
    cold, warm = build_run(config), build_run(config)
    list(RunTrainer(cold).micro_batches())
    cold.caches.values.flush()
    (batch,) = RunTrainer(warm).micro_batches()

    def decoded(needs: set[str]) -> set[str]:
        batch.completed((), needs, CPU)
        return {
            name for c in batch.clips for name in ("sample", "references") if name in vars(c.pixels)
        }

    assert decoded(set()) == set()
    assert decoded({"foreground"}) == {"references"}
    assert decoded({"masks"}) == {"references", "sample"}


def test_a_model_is_loaded_by_the_thread_that_trains(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_config = partial(make_config, "data.train_clips=50", "eval.clips=1", aligned=False)
    train(make_config("name=first", "steps=1"))
    loaders = []
    load = AutoencoderKLWan.from_pretrained

    def loaded(*args: Any, **options: Any) -> Any:
        loaders.append(threading.current_thread())
        return load(*args, **options)

    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", loaded)
    later = train(make_config("name=later", "steps=3", "data.workers=2"))
    assert loaders == [threading.current_thread()]
    plain = train(make_config("name=plain", "steps=3"))
    assert timeless_rows(later) == timeless_rows(plain)


def test_a_moved_batch_is_copied_without_waiting(make_config: MakeConfig) -> None:
    trainer = RunTrainer(build_run(make_config()))
    (batch,) = trainer.micro_batches()
    with HostSyncs() as syncs:
        moved = batch.to(META)
    assert syncs.names == []
    tensors = [moved.latents_BCTHW, moved.noise_BCTHW, moved.sigma_B, moved.text_BLD]
    tensors += [moved.caption_BLD, *moved.references]
    tensors += [x for rows in moved.loaded.values() for x in rows if x is not None]
    assert moved.loaded and all(tensor.is_meta for tensor in tensors)
    assert batch.to(CPU) is batch


@pytest.mark.gpu
def test_a_completed_batch_is_pinned_and_comes_to_the_gpu_as_it_is(
    make_config: MakeConfig,
) -> None:
    trainer = RunTrainer(build_run(make_config()))
    cuda = trainer.ranks.device
    (make,) = trainer.micro_batches().makers
    plain, pinned = make(), trainer.micro_batches().completed(make())
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = pinned.to(cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pinned.latents_BCTHW.is_pinned() and moved.latents_BCTHW.is_cuda
    assert torch.equal(moved.latents_BCTHW.cpu(), plain.latents_BCTHW)


def prefetch(
    micro_batches: Callable[[int], MicroBatches[Any]], config: RunConfig, device: Any = CPU
) -> Prefetch[Any]:
    return Prefetch(micro_batches, 0, config, device)


def numbers(make: Callable[[int], Any], per_step: int = 2) -> Callable[[int], MicroBatches[Any]]:
    """Micro-batches that are numbered over all steps."""

    def of_step(step: int) -> MicroBatches[Any]:
        return MicroBatches([partial(make, per_step * step + i) for i in range(per_step)])

    return of_step


@pytest.mark.parametrize("seed", range(5))
def test_batches_keep_their_order_whatever_takes_how_long(
    make_config: MakeConfig, seed: int
) -> None:
    draw = random.Random(seed)
    waits = [draw.random() * 2e-3 for _ in range(24)]

    def make(number: int) -> int:
        time.sleep(waits[number])
        return number

    config = make_config("steps=12", f"data.workers={1 + seed}", "data.prefetch=5")
    with prefetch(numbers(make), config) as ahead:
        taken = [number for step in range(12) for number in ahead.take(step)]
    assert taken == list(range(24))


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_is_made_ahead_than_asked_for(make_config: MakeConfig, count: int) -> None:
    made: list[int] = []
    config = make_config("steps=4", "data.workers=1", f"data.prefetch={count}")
    with prefetch(numbers(lambda number: made.append(number)), config) as ahead:
        for step in range(4):
            for place, _ in enumerate(ahead.take(step)):
                with ahead.paused():
                    taken = 2 * step + place + 1
                    assert made == list(range(min(taken + count, 8)))


def test_leaving_ends_what_nobody_waits_for(make_config: MakeConfig) -> None:
    begun = threading.Event()

    def make(number: int) -> int:
        while number:
            begun.set()
            check_wanted()
            time.sleep(1e-3)
        return number

    config = make_config("steps=4", "data.workers=2")
    with pytest.raises(KeyboardInterrupt), prefetch(numbers(make), config) as ahead:
        next(iter(ahead.take(0)))
        begun.wait()
        raise KeyboardInterrupt
    assert left_threads() == []


def test_an_encoder_of_a_thread_leaves_the_cast_weights_of_a_step_alone(
    make_config: MakeConfig,
) -> None:
    """Else gradients of weights that a step uses twice are rounded otherwise, now and then."""
    rng = torch.Generator().manual_seed(0)
    weight, one, two = (torch.randn(n, 64, generator=rng) for n in (64, 5, 7))
    weight.requires_grad_()

    def gradient(between: Callable[[], object]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first = F.linear(one, weight)
            between()
            second = F.linear(two, weight)
        (found,) = torch.autograd.grad(first.square().sum() + second.square().sum(), weight)
        return found

    is_within = threading.Event()

    def encode(number: int) -> None:
        if number:  # the first is made here
            is_within.wait()
        with torch.autocast("cpu", enabled=False):
            pass

    def encoded(batches: Iterator[None]) -> None:
        is_within.set()
        next(batches)

    with prefetch(numbers(encode), make_config("steps=2", "data.workers=1")) as ahead:
        batches = iter(ahead.take(0))
        next(batches)
        beside = gradient(lambda: encoded(batches))
    assert torch.equal(beside, gradient(lambda: None))
