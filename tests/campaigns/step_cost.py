"""What a training step of `tiny` costs, for each objective: by hand, in minutes on one core.

    PYTHONPATH=CHECKOUT python tests/campaigns/step_cost.py waits
    python tests/campaigns/step_cost.py times BEFORE AFTER [--steps 20] [--objectives repa ...]
    PYTHONPATH=CHECKOUT python tests/campaigns/step_cost.py flat [--steps 600]
    PYTHONPATH=CHECKOUT python tests/campaigns/step_cost.py overhead [--steps 12]

`waits` counts what would make the host wait for a GPU between two log rows (`host_syncs`: meta
tensors stand for those of a GPU), and what the taps keep. `times` gives medians of steps of two
checkouts, one process each, which take turns step by step. `flat` trains, and prints the resident
memory and the open files of the process every 50 steps. `overhead` measures each
objective as a variant of `demo` against `none`, as `alignlab compare` does: rounds in turn, what
teachers compute included. CHECKOUT, BEFORE and AFTER are folders of the repository at any commit
since its rooms; this file may be of another one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import alignlab
from alignlab.config.run import RunConfig
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.cost import measure_cost
from alignlab.recipe import load_run
from alignlab.train import RunTrainer, Trainer, train
from alignlab.training.nonfinite import NonFiniteWatch
from alignlab.training.setup import build_run
from host_syncs import META, HostSyncs, on_device
from untrained_stage1 import write_untrained

ASSETS = Path(alignlab.__file__).parent / "assets"
# those of `all_objectives`, computed as at real sizes; {stage1}: a folder with both networks
OBJECTIVES = {
    "none": "",
    "refalign": "{name: refalign, teacher: dino, blocks: [0, 1, 2], impl: chunked}",
    "repa": "{name: repa, teacher: dino, blocks: [3], projector_dim: 256}",
    "irepa": "{name: irepa, teacher: dino, blocks: [3]}",
    "align4gen": "{name: align4gen, teacher: [dino, early], blocks: [3], projector_dim: 256}",
    "videorepa": "{name: videorepa, teacher: dino, blocks: [4], projector_dim: 256, impl: chunked}",
    "sara": "{name: sara, teacher: dino, blocks: [4], aligner: '{stage1}/sara', "
    "projector_dim: 256, impl: chunked}",
    "moalign": "{name: moalign, teacher: dino, blocks: [4], head: '{stage1}/moalign', "
    "projector_dim: 256, impl: chunked}",
    "crepa": "{name: crepa, teacher: dino, blocks: [3], projector_dim: 256}",
    "layersync": "{name: layersync, blocks: [2], deep_blocks: [4]}",
    "sra": "{name: sra, blocks: [2], deep_blocks: [5], projector_dim: 256}",
    "self_flow": "{name: self_flow, blocks: [2], deep_blocks: [5], projector_dim: 256}",
    "vae_repa": "{name: vae_repa, blocks: [3], projector_dim: 256}",
    "dispersive": "{name: dispersive, blocks: [1]}",
    "local_gram_flow": "{name: local_gram_flow, teacher: dino, blocks: [6], projector_dim: 256}",
    "m2_repa": "{name: m2_repa, teacher: [dino, early], blocks: [3], projector_dim: 256}",
    "haste_attention": "{name: haste_attention, teacher: maps, blocks: [1, 2]}",
}
# teachers beside the recipes' own, which some of them read
TEACHERS = (
    "teachers.early={family: dinov2, path: assets/tiny-dino, feature: 'layer:1'}",
    "teachers.maps={family: dinov2, path: assets/tiny-dino, feature: 'attention:2-3'}",
)
QUIET = ("tracking.mlflow=none", "eval.clips=4", "eval.sample_clips=0", "eval.generated_clips=0")


def config_of(name: str, folder: Path, *settings: str) -> RunConfig:
    """The recipe `tiny` with this objective in place of its own."""
    chosen = OBJECTIVES[name].replace("{stage1}", str(folder / "stage1"))
    objective = f"objectives.ra={chosen}" if chosen else "objectives={}"
    return load_run("tiny", [f"output={folder}", *TEACHERS, objective, *QUIET, *settings])


def prepare(folder: Path) -> None:
    """Writes the Stage 1 networks that two objectives read."""
    (folder / "stage1").mkdir()
    teacher, wan = "assets/tiny-dino", "assets/tiny-wan"
    write_untrained(folder / "stage1", teacher=teacher, dim=96, wan=wan, text_dim=64, grid=(4, 4))


def count_waits(folder: Path) -> None:
    """Prints, for each objective, waits of a step and bytes kept by the taps."""
    for name in OBJECTIVES:
        run = build_run(config_of(name, folder))
        with run.branch:
            RunTrainer(run).step(RunTrainer(run).micro_batches())
            with on_device(run):
                trainer = RunTrainer(run)
                batches = list(trainer.micro_batches())
                with HostSyncs():
                    trainer.step(batches)  # makes the optimizer's state
                with HostSyncs() as syncs:
                    scalars: Any = trainer.step(batches)
                    if not hasattr(trainer, "_nonfinite"):  # looked at after the step
                        watch: Any = NonFiniteWatch
                        watch(META).check(1, {k: v for k, v in scalars.items() if v.is_meta})
                (batch,) = batches
                out = run.branch(
                    batch.latents_BCTHW, batch.sigma_B, batch.text_BLD, batch.references
                )
        kept = sum(_bytes(tokens) for tokens in out.taps.values())
        operations = [waited.split(" at ")[0] for waited in syncs.names]
        kinds = {k: operations.count(k) for k in dict.fromkeys(operations)}
        print(
            f"{name:10} waits {len(syncs.names):3}  taps keep {kept:8} bytes  {kinds}", flush=True
        )


def _bytes(tokens: Any) -> int:
    total = 0
    for kind in ("video", "reference"):
        with suppress(ValueError):  # they were not to be kept
            kept = getattr(tokens, kind).tokens_BND
            total += kept.numel() * kept.element_size()
    return total


def serve_steps(folder: Path) -> None:
    """Reads names of objectives, takes a step of each and prints its seconds."""
    trainers: dict[str, RunTrainer] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in trainers:
            trainers[name] = RunTrainer(build_run(config_of(name, folder)))
            trainers[name].run.branch.__enter__()
        batches = list(trainers[name].micro_batches())
        begin = time.perf_counter()
        trainers[name].step(batches)
        print(time.perf_counter() - begin, file=sys.__stdout__, flush=True)


def compare_times(before: Path, after: Path, steps: int, names: list[str]) -> None:
    """Prints medians and the median of the paired ratios."""
    sides = []
    for tree in (before, after):
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", __file__, "serve"]
        sides.append(
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )

    def seconds(side: subprocess.Popen[str], name: str) -> float:
        assert side.stdin is not None and side.stdout is not None
        print(name, file=side.stdin, flush=True)
        return float(side.stdout.readline())

    for name in names:
        pairs = []
        for number in range(steps + 3):
            order = (0, 1) if number % 2 else (1, 0)
            taken = {side: seconds(sides[side], name) for side in order}
            pairs.append((taken[0], taken[1]))
        old, new = (statistics.median(pair[i] for pair in pairs[3:]) for i in (0, 1))
        ratio = statistics.median(n / o for o, n in pairs[3:])
        print(
            f"{name:10} {old * 1e3:7.1f} ms -> {new * 1e3:7.1f} ms, ratio {ratio:.3f}", flush=True
        )
    for side in sides:
        assert side.stdin is not None
        side.stdin.close()
        side.wait()


def show_flat(folder: Path, steps: int) -> None:
    """Trains `tiny`, and prints memory and open files of the process every 50 steps."""
    take_step = Trainer.step

    def step(trainer: Trainer, batches: Any) -> Any:
        scalars = take_step(trainer, batches)
        if trainer.state.step % 50 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            mib = pages * os.sysconf("SC_PAGESIZE") / 2**20
            files = len(list(Path("/proc/self/fd").iterdir()))
            print(f"step {trainer.state.step}: {mib:.0f} MiB, {files} files", flush=True)
        return scalars

    Trainer.step = step  # type: ignore[method-assign, assignment]
    train(load_run("tiny", [f"output={folder}", *QUIET, f"steps={steps}", "optim.ema=0.99"]))


def show_overhead(folder: Path, rounds: int, names: list[str]) -> None:
    """Prints a row of a table for each: seconds against `none`, operations, parameters."""
    others = load_compare("demo").variants.keys() - {"none"}
    changes = [f"variants.{name}=null" for name in others - set(names)]
    for name in set(names) - {"none"}:
        chosen = OBJECTIVES[name].replace("{stage1}", str(folder / "stage1"))
        changes.append(f"variants.{name}={{objectives.{name}: {chosen}}}")
    config = load_compare("demo", [*TEACHERS, *QUIET, f"cost.rounds={rounds}", *changes])
    cost = measure_cost(config)
    print(f"no ratio nearer to 1 than {cost.beyond:.3f} is a difference ({rounds} rounds)")
    print("| objective | time of a step, against none | GFLOP | parameters |\n|---|---|---|---|")
    for name in [name for name in OBJECTIVES if name in cost.variants]:
        found, ratio = cost.variants[name], cost.variants[name].slower
        interval = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
        print(
            f"| {name} | {ratio.value:.2f}{interval} | {found.flops / 1e9:.2f} "
            f"| {found.parameters:,} |"
        )
    print(f"none: {cost.variants['none'].seconds * 1e3:.0f} ms")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["waits", "times", "flat", "overhead", "serve"])
    parser.add_argument("trees", nargs="*", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        if given.what == "waits":
            count_waits(folder)
        elif given.what == "times":
            before, after = given.trees
            compare_times(before, after, given.steps or 20, given.objectives or list(OBJECTIVES))
        elif given.what == "overhead":
            show_overhead(folder, given.steps or 12, given.objectives or list(OBJECTIVES))
        elif given.what == "serve":
            serve_steps(folder)
        else:
            show_flat(folder, given.steps or 600)


if __name__ == "__main__":
    main()
