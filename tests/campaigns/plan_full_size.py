"""A plan's memory against a measured peak, at the full size of Wan 1.3B: by hand, minutes.

    PYTHONPATH=CHECKOUT python tests/campaigns/plan_full_size.py [--work /tmp/plan_full_size]

Writes a pipeline folder with a transformer of 30 layers and 1.4 billion random bf16 weights
(2.8 GB) beside the tiny autoencoder, text encoder and teacher, takes LoRA steps on the CPU, and
prints the peak of live tensors in the second beside what `alignlab.plan` says without weights, and
what torch's own allocator counted in a third (with temporary buffers inside operations, which no
live tensor shows). Clips of 9 frames of 256x256 with two references make 1,280 tokens: activations
are more than half of the peak.
"""

import argparse
import json
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import alignlab
from alignlab.config.run import RunConfig
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_step import fake_step
from alignlab.plan.live_memory import Peak
from alignlab.recipe import load_run
from alignlab.train import RunTrainer
from alignlab.units import GIB
from measured_steps import measured_steps

TINY = Path(alignlab.__file__).parent / "assets" / "tiny-wan"
FULL = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
RECIPE = """
name: full_size
steps: 2
model: {{path: {wan}, train: lora, precision: bf16}}
data: {{name: shapes, frames: 9, size: [256, 256], references: [2, 2], train_clips: 2}}
teachers: {{dino: {{family: dinov2, path: assets/tiny-dino}}}}
objectives: {{ra: {{name: refalign, teacher: dino}}}}
flow: {{text_dropout: 0, reference_dropout: 0, both_dropout: 0}}
optim: {{batch_size: 1}}
eval: {{sample_clips: 0, generated_clips: 0}}
tracking: {{mlflow: none}}
output: {output}
"""


def write_pipeline(folder: Path) -> None:
    """The tiny pipeline with a transformer of the full size."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("transformer"))
    config = json.loads((TINY / "transformer" / "config.json").read_text())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = WanTransformer3DModel.from_config(config | FULL)
    finally:
        torch.set_default_dtype(torch.float32)
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")


def planned(config: RunConfig) -> Peak:
    """What the plan says, of a CPU."""
    with ExitStack() as stack:
        return fake_step(config, Architectures(stack), is_cuda=False).peak


def shown(name: str, peak: Peak, seconds: float) -> str:
    """A line."""
    weights = peak.by_label.get("weights", 0)
    rest = peak.total - weights
    return (
        f"{name}: {peak.total / GIB:.3f} GiB (weights {weights / GIB:.3f}, all else "
        f"{rest / GIB:.3f}) during {peak.when}, {seconds:.0f} s"
    )


def allocated(trainer: RunTrainer, trace: Path) -> int:
    """Bytes that a step allocates at most at once, as the profiler hears of the allocator."""
    with (
        trainer.run.branch,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        trainer.step(trainer.micro_batches())
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return max(int(event["args"]["Total Allocated"]) for event in memory)


def main() -> None:
    """Prints both peaks and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("/tmp/plan_full_size"))
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "wan").is_dir():
        write_pipeline(work / "wan")
    recipe = work / "full_size.yaml"
    recipe.write_text(RECIPE.format(wan=work / "wan", output=work / "runs"))
    config, begin = load_run(recipe, []), time.monotonic()
    plan = planned(config)
    print(shown("planned", plan, time.monotonic() - begin), flush=True)
    begin = time.monotonic()
    peak, standing, trainer = measured_steps(config)
    print(shown("measured", peak, time.monotonic() - begin))
    print(f"planned / measured: {plan.total / peak.total:.4f}")
    stays = sum(standing.values())
    total = stays + allocated(trainer, work / "trace.json")
    print(f"allocator: {total / GIB:.3f} GiB ({stays / GIB:.3f} of them from before the step)")
    print(f"planned / allocator: {plan.total / total:.4f}")


if __name__ == "__main__":
    main()
