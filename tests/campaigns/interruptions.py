"""Kills, signals and full disks at random moments of every command; by hand, minutes to an hour.

    python tests/campaigns/interruptions.py [--kinds train,sweep] [--kills 20] [--signals 10]
        [--disks 10] [--first 20] [--crowds 3] [--seed 0] [--out results.csv]

Each trial starts a command of a kind, interrupts it, and gives the same command again until it
ends: all that it leaves has to be what the uninterrupted command left. A kind is `train` with
MLflow, `stage1`, `compare` of two variants and two seeds, `budget` one of one seed with equal
compute, `sweep` with TPE past its random trials, `workers` the same with two worker processes, and
`build` a `cache build` of 72 clips.
An interruption is SIGKILL, SIGINT or SIGTERM to the whole process group at a random moment, SIGKILL
within a second of the first file in a new output folder, or a disk that is full at some point: a
small tmpfs that grows before the second try (for root), else RLIMIT_FSIZE. There the dataset cache
leaves nothing free to checkpoints, so that it meets the full disk as well. A crowd, of `compare`
alone, interrupts nothing: two comparisons with two workers each, and a `cache build`, begin at once
with one dataset cache, and both comparisons have to leave the same as one that is alone.

Commands run in children that are forked from a process which has imported everything: that is all
that differs from the command line. The sweep's workers are started as ever. Two workers finish
trials in an order that the clock decides, so for `workers` no trial is lost, trained twice or open,
and each has the values that its run's result says; the values tried may differ.

Every dataset cache has to be whole, and its entries those that the uninterrupted command wrote: all
of them after `build`, else some may be missing, since a resumed run reads the rest of its clips. An
unfinished shard of a killed writer may stay; `cache prune` removes it.
"""

import argparse
import csv
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch

from alignlab.dataset_cache import disk_room
from alignlab.dataset_cache.shard_folder import SHARDS, leftovers
from alignlab.dataset_cache.survey import damaged_entries, survey
from forked_command import ForkedCommand
from run_contents import read_table, timeless, timeless_contents, timeless_rows

Interruption = Literal["SIGKILL", "first second", "SIGINT", "SIGTERM", "full disk", "crowd"]

SHARED = """
steps: 6
model: {path: assets/tiny-wan}
data: {name: shapes, frames: 5, size: [48, 48], references: [2, 3], train_clips: 6, val_clips: 4}
teachers:
  dino: {family: dinov2, path: assets/tiny-dino, feature: post_norm}
tracking: {log_every: 2}
checkpoint: {every: 2, keep: 1}
"""
RUN = """
optim: {lr: 1e-3, batch_size: 2, ema: 0.9}
eval: {clips: 1, batch_size: 8, sample_clips: 1, sample_steps: 2}
"""
OBJECTIVE = "{ra: {name: refalign, teacher: dino, blocks: [0, 2]}}"
VARIANTS = f"""
variants: {{none: {{}}, ra: {{objectives: {OBJECTIVE}}}}}
baseline: none
seeds: [0, 1]
"""
SPACE = f"""
objectives: {OBJECTIVE}
space:
  objectives.ra.weight: {{kind: float, low: 0.1, high: 10, log: true}}
sampler: {{name: tpe, seed: 1, startup: 2}}
metric: val/flow
trials: 4
seeds: [0]
"""
RECIPES = {
    "train": SHARED + RUN + f"objectives: {OBJECTIVE}\n",
    "stage1": SHARED
    + "stage1: {kind: sara, hidden: 16, embed_dim: 8, val_clips: 2}\n"
    + "optim: {lr: 1e-3, batch_size: 2}\n",
    "compare": SHARED + RUN + VARIANTS,
    "budget": SHARED + RUN + VARIANTS.replace("[0, 1]", "[0]") + "budget: compute\n",
    "sweep": SHARED + RUN + SPACE,
    "workers": SHARED + RUN + SPACE,
    "build": SHARED.replace("train_clips: 6, val_clips: 4", "train_clips: 64, val_clips: 8")
    + RUN.replace("clips: 1,", "clips: 8,", 1)
    + f"objectives: {OBJECTIVE}\n",
}
COMMANDS = {
    "train": ["train"],
    "stage1": ["stage1", "sara"],
    "compare": ["compare"],
    "budget": ["compare"],
    "sweep": ["sweep"],
    "workers": ["sweep"],
    "build": ["cache", "build"],
}
LAZY = (
    "alignlab.cli",
    "alignlab.train",
    "alignlab.training.cache_build",
    "alignlab.stage1.train",
    "alignlab.experiments.compare.run",
    "alignlab.experiments.report.write",
    "alignlab.experiments.report.page",
    "alignlab.experiments.sweep.run",
    "alignlab.experiments.sweep.launch",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "optuna",
    "transformers.models.dinov2.modeling_dinov2",
)
DEBRIS = ("tmp", "partial", "removed")
EXIT_CODES = {
    "SIGKILL": -signal.SIGKILL,
    "first second": -signal.SIGKILL,
    "SIGINT": 130,
    "SIGTERM": 143,
    "full disk": 1,
}
COST_METRICS = ("time/", "memory/", "cost/")


@dataclass
class Trial:
    """What was seen of one interruption.

    Args:
        kind: of the command.
        interruption: what was done to it.
        moment: seconds after its start, or MiB of the disk.
        ended: its exit code; negative for a signal.
        seconds: from the interruption to the end of its processes.
        said: lines on stderr after the interruption that are not of the log, one after another.
        hit: whether it was still at work.
        fault: what was wrong, empty if all was as it has to be.
    """

    kind: str
    interruption: str
    moment: float
    ended: int = 0
    seconds: float = 0.0
    said: str = ""
    hit: bool = True
    fault: str = ""


def contents(kind: str, output: Path) -> dict[str, Any]:
    """All that a command leaves and that no clock decides, by what it is."""
    left: dict[str, Any] = {}
    for log in sorted(output.rglob("metrics.jsonl")):
        run = log.parent
        name = run.relative_to(output).as_posix()
        if kind == "workers":  # the values of a trial may differ
            continue
        for part in ("checkpoints", "samples", "stage1"):
            if (run / part).is_dir():
                left |= {f"{name}/{part}/{k}": v for k, v in timeless_contents(run / part).items()}
        left[f"{name}/metrics.jsonl"] = timeless_rows(run)
        result = json.loads((run / "result.json").read_text())
        for key in ("checksum", "files", "log"):  # of files in which times are
            result.pop(key, None)
        if "metrics" in result:
            result["metrics"] = timeless(result["metrics"])
        left[f"{name}/result.json"] = result
    for table in sorted(output.rglob("table.csv")):
        rows = read_table(table)
        left["table.csv"] = [row for row in rows if not row["metric"].startswith(COST_METRICS)]
    for table in sorted(output.glob("*/trials.csv")):  # not those in MLflow
        left["trials.csv"] = _trials(kind, table)
    return left


def _trials(kind: str, table: Path) -> list[dict[str, str]]:
    rows = [timeless(row) for row in read_table(table)]
    if kind != "workers":
        return rows
    for row in rows:
        result = table.parent / row["folder"] / "seed-0" / "result.json"
        measured = json.loads(result.read_text())["metrics"]["val/flow"]
        if float(row["val/flow"]) != measured:
            raise AssertionError(f"trial {row['trial']} has not the value of its run")
    return [{key: row[key] for key in ("trial", "state")} for row in rows]


def differences(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """What is not as expected, in a few words; empty if nothing is."""
    names = expected.keys() | found.keys()
    odd = sorted(name for name in names if expected.get(name) != found.get(name))
    return f"differs: {', '.join(odd[:3])}" if odd else ""


def cache_entries(output: Path) -> dict[str, str]:
    """Checksum of each entry of the dataset cache, by what the entry is of.

    Raises:
        ValueError: something in there is damaged.
    """
    if not (output / "cache" / SHARDS).is_dir():
        return {}
    found = survey(output / "cache")
    damaged = [*found.damaged.values(), *damaged_entries(found).values()]
    if damaged:
        raise ValueError(f"the dataset cache is damaged: {damaged[0]}")
    return {row.id: row.sha256 for _, row in found.rows()}


def other_entries(kind: str, expected: dict[str, str], found: dict[str, str]) -> str:
    """What a dataset cache has too much or otherwise, and after `build` too little."""
    if kind == "build" and (lost := expected.keys() - found.keys()):
        return f"the dataset cache has {len(lost)} entries too few"
    odd = [id for id, checksum in found.items() if expected.get(id) != checksum]
    return f"the dataset cache has {len(odd)} other entries" if odd else ""


def debris(output: Path) -> str:
    """Temporary files that are left; empty if none is."""
    unfinished = leftovers(output / "cache" / SHARDS)
    left = [
        path.name
        for path in output.rglob("*")
        if path.name.rsplit(".", 1)[-1] in DEBRIS and path not in unfinished
    ]
    return f"left: {', '.join(left[:3])}" if left else ""


class Campaign:
    """The trials of one kind.

    Args:
        kind: see `RECIPES`.
        folder: to work in.
        seed: of the moments.
    """

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self.kind = kind
        self.folder = folder / kind
        self.folder.mkdir(parents=True)
        self.recipe = self.folder / "recipe.yaml"
        self.recipe.write_text(f"name: {kind}" + RECIPES[kind])
        self.draw = random.Random(f"{kind} {seed}")
        self.expected: dict[str, Any] = {}
        self.entries: dict[str, str] = {}
        self.duration = 0.0
        self.size = 0
        self.count = 0

    def uninterrupted(self) -> None:
        """Runs the command as it is, for what the others have to leave."""
        output = self.folder / "uninterrupted"
        command = self._command(output)
        command.start()
        ended = command.wait(1200)
        if ended != 0:
            raise SystemExit(f"{self.kind}, uninterrupted: {ended}\n{command.errors.read_text()}")
        self.duration = time.monotonic() - command.begun
        self.expected = contents(self.kind, output)
        self.entries = cache_entries(output)
        self.size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())

    def trial(self, interruption: Interruption) -> Trial:
        """Interrupts a command in a new output folder, gives it again, and compares."""
        self.count += 1
        output = self.folder / f"{self.count:03d}"
        if interruption == "full disk":
            trial = self._full_disk(output)
        elif interruption == "crowd":
            trial = self._crowd(output)
        else:
            trial = self._interrupted(interruption, output)
        shutil.rmtree(output, ignore_errors=True)
        return trial

    def _command(self, output: Path) -> ForkedCommand:
        options = ["--workers", "2"] if self.kind == "workers" else []
        arguments = [*COMMANDS[self.kind], str(self.recipe), f"output={output}", *options]
        return ForkedCommand(arguments, output.with_suffix(".err"))

    def _interrupted(self, interruption: Interruption, output: Path) -> Trial:
        command = self._command(output)
        command.start()
        if interruption == "first second":
            while not (output.is_dir() and any(output.iterdir())):
                time.sleep(0.001)
            moment = time.monotonic() - command.begun + self.draw.uniform(0, 1)
        else:
            moment = self.draw.uniform(0, self.duration * 0.98)
        time.sleep(max(0.0, command.begun + moment - time.monotonic()))
        trial = Trial(self.kind, interruption, round(moment, 3))
        before = command.errors.stat().st_size if command.errors.exists() else 0
        number = signal.SIGKILL
        if interruption in ("SIGINT", "SIGTERM"):
            number = signal.Signals[interruption]
        sent = time.monotonic()
        command.send(number)
        ended = command.wait(60)
        trial.seconds = round(time.monotonic() - sent, 2)
        if ended is None:
            command.kill()
            return replace(trial, fault="did not end within 60 s")
        trial.ended, trial.hit = ended, ended != 0
        said = command.errors.read_bytes()[before:].decode(errors="replace")
        self._check_words(trial, said)
        return self._again(trial, output)

    def _check_words(self, trial: Trial, said: str) -> None:
        if "Traceback" in said:
            trial.fault = f"traceback: {said.strip().splitlines()[-1]}"
        elif trial.hit and trial.ended != EXIT_CODES[trial.interruption]:
            trial.fault = f"exit code {trial.ended}"
        if trial.interruption not in ("SIGINT", "SIGTERM", "full disk") or not trial.hit:
            return
        ends = ("error", "interrupted", "stopped")
        lines = [line for line in said.splitlines() if line.startswith(ends)]
        trial.said = " / ".join(dict.fromkeys(lines))
        if not lines and not trial.fault:
            trial.fault = f"no word of it: {said.strip()[-200:]!r}"

    def _full_disk(self, output: Path) -> Trial:
        # as often in the small files of the start as in a checkpoint
        size = math.exp(self.draw.uniform(math.log(2**14), math.log(self.size * 0.95)))
        limit = int(size) // 4096 * 4096
        trial = Trial(self.kind, "full disk", round(limit / 2**20, 2))
        command = self._command(output)
        with _small_disk(output, limit) as (prepare, make_room):
            command.start(prepare)
            ended = command.wait(self.duration * 10 + 120)
            if ended is None:
                command.kill()
                return replace(trial, fault="did not end")
            trial.ended, trial.hit = ended, ended != 0
            self._check_words(trial, command.errors.read_text(errors="replace"))
            make_room()
            return self._again(trial, output)

    def _crowd(self, output: Path) -> Trial:
        trial = Trial(self.kind, "crowd", 0.0)
        given, names = [str(self.recipe), f"output={output}"], ("first", "second")
        lines = [["compare", *given, f"name={name}", "--workers", "2"] for name in names]
        lines += [["cache", "build", *given]]
        commands = [ForkedCommand(a, output.with_suffix(f".{n}.err")) for n, a in enumerate(lines)]
        for command in commands:
            command.start()
        for command in commands:
            ended = command.wait(self.duration * 10 + 120)
            if ended != 0:
                command.kill()
                trial.fault = f"ended with {ended}: {command.errors.read_text()[-200:]}"
        trial.seconds = round(time.monotonic() - commands[0].begun, 2)
        if trial.fault:
            return trial
        alone = {name.removeprefix(f"{self.kind}/"): held for name, held in self.expected.items()}
        for name in names:
            found = contents(self.kind, output / name)
            trial.fault = trial.fault or differences(alone, found)
        missing = self.entries.keys() - cache_entries(output).keys()
        trial.fault = (
            trial.fault or debris(output) or (f"{len(missing)} missing" if missing else "")
        )
        return trial

    def _again(self, trial: Trial, output: Path) -> Trial:
        command = self._command(output)
        before = command.errors.stat().st_size
        command.start()
        ended = command.wait(self.duration * 10 + 120)
        if ended is None:
            command.kill()
            trial.fault = trial.fault or "the command that resumes is stuck"
            return trial
        if ended != 0:
            said = command.errors.read_bytes()[before:].decode(errors="replace").strip()
            last = said.splitlines()[-1] if said else ""
            trial.fault = trial.fault or f"the command that resumes ended with {ended}: {last}"
            return trial
        try:
            found, entries = contents(self.kind, output), cache_entries(output)
        except (AssertionError, OSError, ValueError) as error:
            return replace(trial, fault=trial.fault or f"not readable: {error}")
        trial.fault = trial.fault or differences(self.expected, found) or debris(output)
        trial.fault = trial.fault or other_entries(self.kind, self.entries, entries)
        return trial


@contextmanager
def _small_disk(
    output: Path, limit: int
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """A disk of `limit` bytes as the folder `output`: what the child does, and what makes room."""
    output.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", str(output)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:  # not root: no file may be longer than half of it

        def limit_files() -> None:
            _take_all_room()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit // 2,) * 2)

        yield limit_files, lambda: None
        return

    def make_room() -> None:  # and more than the dataset cache leaves free
        subprocess.run(["mount", "-o", "remount,size=4g", str(output)], check=True)

    try:
        yield _take_all_room, make_room
    finally:
        subprocess.run(["umount", "-l", str(output)], check=True)


def _take_all_room() -> None:
    """The dataset cache keeps nothing free; in this process, which is a child."""
    disk_room.SHARE, disk_room.AT_LEAST = 0.0, 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--kinds", default=",".join(RECIPES))
    for name, count in (
        ("kills", 20),
        ("signals", 10),
        ("disks", 10),
        ("first", 20),
        ("crowds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    return parser.parse_args()


def _print_summary(trials: Sequence[Trial]) -> None:
    print("\n| command | interruption | tried | hit | exact | longest to end, s |")
    print("|---|---|---|---|---|---|")
    for kind, interruption in dict.fromkeys((t.kind, t.interruption) for t in trials):
        these = [t for t in trials if (t.kind, t.interruption) == (kind, interruption)]
        hit, good = sum(t.hit for t in these), sum(not t.fault for t in these)
        slowest = max(t.seconds for t in these)
        print(f"| {kind} | {interruption} | {len(these)} | {hit} | {good} | {slowest:.1f} |")


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    for module in LAZY:
        importlib.import_module(module)
    folder = Path(tempfile.mkdtemp(prefix="interruptions-"))
    plan: list[tuple[Interruption, int]] = [
        ("SIGKILL", options.kills),
        ("SIGINT", options.signals),
        ("SIGTERM", options.signals),
        ("full disk", options.disks),
    ]
    trials: list[Trial] = []
    for kind in options.kinds.split(","):
        campaign = Campaign(kind, folder, options.seed)
        campaign.uninterrupted()
        print(f"{kind}: {campaign.duration:.1f} s, {campaign.size / 2**20:.1f} MiB", flush=True)
        own: dict[str, list[tuple[Interruption, int]]] = {
            "train": [("first second", options.first)],
            "compare": [("crowd", options.crowds)],
        }
        for interruption, count in plan + own.get(kind, []):
            for _ in range(count):
                trial = campaign.trial(interruption)
                trials.append(trial)
                print("  ", trial.fault or "exact", trial, flush=True)
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in fields(Trial))
            writer.writerows(astuple(trial) for trial in trials)
    _print_summary(trials)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(trial.fault for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
