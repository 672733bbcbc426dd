"""Memory and speed settings on the device: does each train, as the default does, and at what cost.

On the shipped tiny model, whose costs say little: what is open is whether the packages' kernels,
pinned copies, compiled code and recomputation work there at all.
"""

import gc
import tempfile
from collections.abc import Sequence

import torch

from alignlab.config.run import RunConfig
from alignlab.errors import UserError, one_line
from alignlab.experiments.bench.gpu_phases import Findings
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.measure import seconds_of
from alignlab.train import RunTrainer
from alignlab.training.batches import Batch
from alignlab.training.build_optimizer import check_optimizer
from alignlab.training.setup import build_run

STEPS = 4  # the last two are timed
BF16 = "model.precision=bf16"
BASE = "as it is"
BF16_BASE = "bf16"
LARGEST_GAP = {"fp32": 1e-2, "bf16": 3e-2}
"""Of the last loss to that of the default, as a share. Four steps on the CPU are within
0.0005 of it with every setting that runs there."""
SETTINGS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "gradient_checkpointing ops": ("model.gradient_checkpointing=ops",),
    "gradient_checkpointing every:2": ("model.gradient_checkpointing=every:2",),
    "gradient_checkpointing full": ("model.gradient_checkpointing=true",),
    "adamw_8bit": ("optim.name=adamw_8bit",),
    "offload": ("optim.offload=true",),
    "adamw_8bit, offload": ("optim.name=adamw_8bit", "optim.offload=true"),
    BF16_BASE: (BF16,),
    "bf16 weights, kahan": (BF16, "model.weights=bf16", "optim.name=adamw_bf16_kahan"),
    "compiled blocks": ("model.compile=blocks",),
    "bf16, compiled blocks": (BF16, "model.compile=blocks"),
    "compiled blocks, ops": ("model.compile=blocks", "model.gradient_checkpointing=ops"),
}
"""By their names in the report; those whose code takes minutes to compile stand last."""
CPU_LACKS = ("offload", "compile")  # refused there, or compiled for minutes
GPU_ONLY = frozenset(name for name in SETTINGS if any(word in name for word in CPU_LACKS))


def measure_settings(found: Findings, names: Sequence[str] = tuple(SETTINGS)) -> None:
    """Takes the first steps of one run with each setting; rows of loss, seconds and peak memory.

    Args:
        found: gets a line for each, and fails where one does not train or has another loss.
        names: of `SETTINGS`; a default stands before what is compared with it.
    """
    defaults: dict[str, float] = {}
    for name in names:
        if name in GPU_ONLY and found.device.type != "cuda":
            found.say(f"{name}: left out, it is for a GPU")
            continue
        if found.left() < 0:
            found.say(f"{name}: not begun")
            continue
        with tempfile.TemporaryDirectory() as folder:
            overrides = [f"output={folder}", "optim.batch_size=2", *SETTINGS[name]]
            config = load_compare("demo", overrides).run("refalign", 0)
            try:
                loss, seconds, peak_mib = _steps(config, found)
            except (UserError, RuntimeError) as error:  # another setting may still train
                found.fail(f"{name}: {one_line(error)[:300]}")
                continue
        precision = config.model.precision
        default = defaults.setdefault(precision, loss)
        gap = abs(loss - default) / abs(default)
        found.row(name, "loss of the last step", "", [loss])
        found.row(name, "seconds of a step", "s", seconds)
        held = ""
        if peak_mib is not None:
            found.row(name, "peak memory of a step", "MiB", [peak_mib])
            held = f", {peak_mib:.4g} MiB at most"
        line = f"{name}: loss {loss:.5f}, {gap:.2e} off; {min(seconds):.3g} s a step{held}"
        if gap <= LARGEST_GAP[precision]:  # also what is not finite fails
            found.say(line)
        else:
            found.fail(line)


def _steps(config: RunConfig, found: Findings) -> tuple[float, list[float], float | None]:
    """The last loss, seconds of the last two steps, and the most that their allocator held."""
    device = found.device
    check_optimizer(config.optim, device)
    gc.collect()
    run = build_run(config)
    trainer, seconds, losses = RunTrainer(run), [0.0], [torch.empty(0)]
    with run.branch:
        for step in range(STEPS):
            batches = list(trainer.micro_batches())
            if device.type == "cuda" and step == STEPS - 2:
                torch.cuda.reset_peak_memory_stats(device)

            def work(batches: list[Batch] = batches) -> None:
                losses.append(trainer.step(batches)["loss/total"])

            seconds.append(seconds_of(work, device))
    is_counted = device.type == "cuda"
    peak_mib = torch.cuda.max_memory_allocated(device) / 2**20 if is_counted else None
    return float(losses[-1]), seconds[-2:], peak_mib
