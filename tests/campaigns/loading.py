"""What a training waits for its clips: encoded live, from a cold and a warm cache, made ahead.

    PYTHONPATH=CHECKOUT python tests/campaigns/loading.py steps [--data shapes real_clips]
        [--ways live warm ...] [--steps 24] [--rounds 5] [--threads 1]
    PYTHONPATH=CHECKOUT python tests/campaigns/loading.py share [--steps 3] [--threads 1]

By hand. `steps` trains the first steps of a variant with RefAlign of the recipes `demo` and
`real_clips`, in each of `WAYS` in turn, and prints medians of steps per second; no clip stays in
memory, as with a data set that is larger than it. All ways of a data set have to end with the same
weights and rows. `share` has torch's profiler say how much of a step is spent in frozen models,
with encoders, teacher and transformer as wide as Wan 2.1 1.3B's and of few layers.
"""

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import DINOv3ViTConfig, DINOv3ViTModel, UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from alignlab.config.run import RunConfig
from alignlab.data.real_clips.prepare import prepare_real_clips
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.experiments.compare.config import load_compare
from alignlab.models.frozen_parts import FrozenParts
from alignlab.models.text_encoder import TextEncoder
from alignlab.recipe import load_run
from alignlab.runs.metric_rows import read_rows
from alignlab.teachers import Teacher
from alignlab.train import RunTrainer, Trainer, train
from alignlab.training.clip_memory import ClipMemory
from alignlab.training.setup import Caches, build_run
from run_contents import timeless_rows
from tiny_wan import tokenizer_of_captions

SKIPPED = 4  # steps that load models, fill caches of torch, and begin the threads
ENCODING = "frozen models"
# name: (cache, data.workers, data.prefetch)
WAYS: dict[str, tuple[str, int, int | None]] = {
    "live": ("off", 0, None),
    "live, 1 worker": ("off", 1, 2),
    "live, 2 workers": ("off", 2, 2),
    "cold": ("cold", 0, None),
    "cold, 1 worker": ("cold", 1, 2),
    "warm": ("warm", 0, None),
    "warm, 1 worker": ("warm", 1, 2),
}


class Done(BaseException):
    """The last step was taken."""


def config_of(data: str, folder: Path, name: str, way: str, steps: int) -> RunConfig:
    """RefAlign's variant of the comparison, its data read in a way."""
    cache, workers, ahead = WAYS[way]
    recipe = "demo" if data == "shapes" else "real_clips"
    settings = [f"output={folder}", f"steps={steps}", "tracking={mlflow: none, log_every: 1}"]
    if data == "real_clips":
        settings.append(f"data.path={folder / 'real_clips'}")
    run = load_compare(recipe, settings).runs["refalign"]
    kept = folder / (f"cold-{name}" if cache == "cold" else f"warm-{data}")
    mode = "off" if cache == "off" else "write"
    cached = run.data.cache.model_copy(update={"mode": mode, "path": str(kept)})
    changes = {"cache": cached, "workers": workers, "prefetch": ahead}
    return run.model_copy(
        update={"name": name, "data": run.data.model_copy(update=changes), "seed": 0}
    )


def seconds_and_bits(config: RunConfig) -> tuple[float, float, str]:
    """Seconds of a step, those of it that it waits for data, and a digest of weights and rows."""
    ends: list[float] = []
    take_step = Trainer.step

    def step(trainer: Trainer, batches: Any) -> Any:
        scalars = take_step(trainer, batches)
        ends.append(time.perf_counter())
        return scalars

    def finish(*_: object) -> None:
        raise Done

    values = EncodedValues.of(config.data.cache, config.output)
    caches = Caches(values, ClipMemory(0), ClipMemory(0))
    with patch.object(Trainer, "step", step), patch.object(RunTrainer, "finish", finish):
        try:
            train(config, caches=caches)
        except Done:
            pass
    folder = Path(config.output, config.name)
    digest = hashlib.sha256(repr(timeless_rows(folder)).encode())
    for path in sorted((folder / "checkpoints").rglob("*.safetensors")):
        digest.update(path.read_bytes())
    waits = [row["time/data"] for row in read_rows(folder / "metrics.jsonl") if "time/data" in row]
    taken = (ends[-1] - ends[SKIPPED - 1]) / (len(ends) - SKIPPED)
    return taken, statistics.median(waits[SKIPPED:]), digest.hexdigest()[:12]


def compare_ways(folder: Path, data: str, ways: list[str], steps: int, rounds: int) -> None:
    """Prints steps per second of each way, medians over the rounds, and whether bits are equal."""
    seconds_and_bits(config_of(data, folder, f"{data}-fill", "warm", steps))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    waits: dict[str, list[float]] = {way: [] for way in ways}
    digests = set()
    for number in range(rounds):
        for place, way in enumerate(ways[:: 1 if number % 2 else -1]):
            name = f"{data}-{number}-{place}"
            taken, waited, digest = seconds_and_bits(config_of(data, folder, name, way, steps))
            seconds[way].append(taken)
            waits[way].append(waited)
            digests.add(digest)
    for way in ways:
        rates = sorted(1 / taken for taken in seconds[way])
        pairs = zip(seconds[ways[0]], seconds[way], strict=True)
        ratio = statistics.median(first / taken for first, taken in pairs)
        print(
            f"{data:10} {way:16} {statistics.median(rates):6.2f} steps/s "
            f"({rates[0]:.2f} to {rates[-1]:.2f}), {ratio:5.2f} times {ways[0]}, "
            f"waits {statistics.median(waits[way]) * 1e3:6.1f} ms a step",
            flush=True,
        )
    same = "the same" if len(digests) == 1 else f"NOT THE SAME: {len(digests)}"
    print(f"{data:10} weights and rows of all {rounds * len(ways)} runs: {same}", flush=True)


def write_wide(folder: Path) -> tuple[Path, Path]:
    """A pipeline and a teacher as wide as the real ones: the whole VAE, one or two layers else."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of_captions()
    text = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=1,
        num_heads=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=AutoencoderKLWan(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=2
        ),
    )
    pipeline.save_pretrained(folder / "wan")
    teacher = DINOv3ViTConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_register_tokens=4,
    )
    DINOv3ViTModel(teacher).save_pretrained(folder / "dinov3")
    return folder / "wan", folder / "dinov3"


@contextmanager
def marked() -> Iterator[None]:
    """The work of frozen models is marked for the profiler."""
    methods = [
        (FrozenParts, "encode_video"),
        (TextEncoder, "encode"),
        (Teacher, "encode"),
    ]
    with ExitStack() as stack:
        for owner, name in methods:
            method = getattr(owner, name)

            @wraps(method)
            def inside(*args: Any, of: Any = method, **settings: Any) -> Any:
                with record_function(f"{ENCODING}: {of.__qualname__}"):
                    return of(*args, **settings)

            stack.enter_context(patch.object(owner, name, inside))
        yield


def show_share(folder: Path, steps: int) -> None:
    """Prints how much of a step frozen models take, live and with a warm cache."""
    wan, teacher = write_wide(folder)
    settings = [
        *(f"output={folder}", f"model.path={wan}", f"teachers.dino.path={teacher}"),
        *("teachers.dino.family=dinov3", "objectives.ra.blocks=[0,1]", "optim.batch_size=1"),
        *("data.size=[128,128]", "data.references=[3,3]", "flow.text_dropout=0"),
        *("flow.reference_dropout=0", "flow.both_dropout=0", "objectives.rp={name: repa, "
          "teacher: dino, blocks: [1], projector_dim: 256}"),
    ]  # fmt: skip
    for way, mode in (("live", "off"), ("fill", "write"), ("warm", "require")):
        run = build_run(load_run("tiny", [*settings, f"data.cache.mode={mode}"]))
        run.clips._memory = ClipMemory(0)
        trainer = RunTrainer(run)

        def take(number: int, trainer: RunTrainer = trainer) -> None:
            trainer.state.step = number
            trainer.step(trainer.micro_batches())

        with run.branch, marked():
            if way == "fill":
                for number in range(steps + 1):
                    take(number)
                run.caches.values.flush()
                continue
            take(0)  # not measured: the first one
            with profile(activities=[ProfilerActivity.CPU]) as found:
                for number in range(1, steps + 1):
                    with record_function("step"):
                        take(number)
        times = {event.key: event.cpu_time_total for event in found.key_averages()}
        whole = times["step"]
        frozen = {name: time for name, time in times.items() if name.startswith(ENCODING)}
        parts = "".join(
            f", {name.split(': ')[1]} {time / whole:.0%}" for name, time in sorted(frozen.items())
        )
        print(
            f"{way}: {whole / steps / 1e6:.2f} s a step, frozen models "
            f"{sum(frozen.values()) / whole:.1%}{parts}",
            flush=True,
        )
        del run, trainer, take


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["steps", "share"])
    parser.add_argument("--data", nargs="+", default=["shapes", "real_clips"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.what == "share":
            show_share(folder, given.steps or 3)
            return
        if "real_clips" in given.data:
            prepare_real_clips(folder / "real_clips")
        for data in given.data:
            compare_ways(folder, data, given.ways, given.steps or 24, given.rounds)


if __name__ == "__main__":
    main()
