"""The phases of the GPU report (`gpu_report.py`), each in a process of its own.

A phase keeps what it found at every step, so that a crash or its time limit loses only what was not
measured yet, and looks at the clock before it begins more. Packages are imported where they are
used: one that is missing costs the phases that need it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignlab.experiments.bench.gpu_report import PASSED, ROOT
from alignlab.parent_process import end_with_parent
from alignlab.units import GIB, MIB

CLOSING_S = 4.0  # of a phase's time, kept for its end


class Findings:
    """What a phase found, kept in a file as it grows.

    Args:
        path: of the file; None: it is kept nowhere.
        device: where the phase computes.
        is_full: whether sizes are real ones.
        seconds: that the phase may take.
        out: folder of the report.
    """

    def __init__(
        self, path: Path | None, device: torch.device, *, is_full: bool, seconds: float, out: Path
    ) -> None:
        self._path = path
        self.device = device
        self.is_full = is_full
        self.out = out
        self.lines: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self._verdict: str | None = None
        self._end = time.monotonic() + seconds - CLOSING_S

    def left(self) -> float:
        """Seconds in which the phase may still begin something."""
        return self._end - time.monotonic()

    def say(self, line: str, *, place: int | None = None) -> None:
        """Adds a line to the report, or replaces the one at `place`."""
        if place is None:
            self.lines.append(line)
        else:
            self.lines[place] = line
        self._keep()

    def row(self, what: str, quantity: str, unit: str, values: Sequence[float]) -> None:
        """Adds figures: median, least and most of several measurements of one thing."""
        ordered = sorted(values)
        self.rows.append(
            {
                "what": what,
                "quantity": quantity,
                "unit": unit,
                "median": f"{ordered[len(ordered) // 2]:.6g}",
                "least": f"{ordered[0]:.6g}",
                "most": f"{ordered[-1]:.6g}",
                "count": len(ordered),
            }
        )
        self._keep()

    def fail(self, line: str) -> None:
        """Adds a line about something that is wrong; the phase goes on and has not passed."""
        if self._verdict is None:
            self._verdict = f"failed: {line}"
        self.say(f"FAILED: {line}")

    def end(self, verdict: str | None = None) -> None:
        """The phase has come to its end, or cannot go on for the reason given."""
        self._verdict = verdict or self._verdict or PASSED
        self._keep()

    def _keep(self) -> None:
        if self._path is None:
            return
        content = {"verdict": self._verdict, "lines": self.lines, "rows": self.rows}
        partial = self._path.with_suffix(".tmp")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(self._path)


def environment(found: Findings) -> None:
    """Writes `environment.json`, and measures what the device can do at best."""
    import platform

    from alignlab.checkout import git
    from alignlab.environment import describe_environment

    facts: dict[str, Any] = dict(describe_environment())
    facts["cores"], facts["torch_cuda"] = os.cpu_count(), torch.version.cuda
    facts["kernel"] = platform.release()
    changed = (git("status", "--porcelain") or b"").decode(errors="replace").splitlines()
    facts["changed_files"] = changed[:50]
    if found.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(found.device)
        free, total = torch.cuda.mem_get_info(found.device)
        facts["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "l2_mib": gpu.L2_cache_size / MIB,
            "total_gib": total / GIB,
            "free_gib": free / GIB,
        }
        query = "driver_version,name,memory.total,clocks.sm,clocks.mem,power.limit"
        try:
            shown = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
                capture_output=True,
                text=True,
                timeout=15,
                check=False,
            )
            facts["nvidia_smi"] = shown.stdout.strip().splitlines()
        except (OSError, subprocess.TimeoutExpired) as error:
            facts["nvidia_smi"] = str(error)
    text = json.dumps(facts, indent=1) + "\n"
    (found.out / "environment.json").write_text(text, encoding="utf-8")
    shown_facts = ("device", "commit", "python", "torch", "triton", "diffusers", "transformers")
    found.say(", ".join(f"{name} {facts[name]}" for name in shown_facts))
    if changed:
        found.say(f"the checkout has changes that are not committed: {len(changed)} files")
    _ceilings(found)


def _ceilings(found: Findings) -> None:
    """Rates of a large matrix product and of a large copy, which no step exceeds."""
    from alignlab.experiments.compare.measure import seconds_of

    device, side = found.device, 8192 if found.is_full else 256
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)

        def multiply(left: Any = left, right: Any = right, out: Any = out) -> None:
            torch.mm(left, right, out=out)

        multiply()
        rates = [2e-12 * side**3 / seconds_of(multiply, device) for _ in range(5)]
        found.row(f"matrix product {side}, {dtype}", "rate", "TFLOP/s", rates)
        found.say(f"matrix product of side {side} in {dtype}: {sorted(rates)[2]:.3g} TFLOP/s")
    source = torch.randn(2**28 if found.is_full else 2**16, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    rates = [2e-12 * source.nbytes / seconds_of(copy, device) for _ in range(5)]
    found.row("copy, bytes read and written", "rate", "TB/s", rates)
    found.say(f"copy on the device: {sorted(rates)[2]:.3g} TB/s read and written")


def kernels(found: Findings) -> None:
    """See `kernel_phase.py`."""
    from alignlab.experiments.bench.kernel_phase import measure_kernels

    measure_kernels(found)


def step(found: Findings) -> None:
    """See `real_step.py`."""
    from alignlab.experiments.bench.real_step import measure_step

    measure_step(found)


def tests(found: Findings) -> None:
    """Runs the tests for a GPU, or on a CPU a few of them; stops itself in time."""
    import pytest

    folder = ROOT / "tests"
    if not folder.is_dir():
        found.end("failed: there are no tests beside alignlab; run it in a checkout")
        return
    files = sorted(
        path
        for path in folder.rglob("test_*.py")
        if (path.parent.name == "kernels" and "gpu_builds" not in path.name)
        or "mark.gpu" in path.read_text(encoding="utf-8")
    )
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--rootdir={ROOT}"]
    if found.device.type == "cuda":
        os.environ["ALIGNLAB_TEST_GPU"] = "1"
    else:
        files = [folder / "kernels" / "test_dispatch.py"]
        options += ["-k", "not compile"]
    missing = _what_conftest_lacks(folder)
    if missing is not None:
        found.say(f"only the tests of kernels were run: {missing}")
        files = [path for path in files if path.parent.name == "kernels"]
        options.append("--noconftest")
    counted = _Counted(found)
    code = pytest.main([*options, *map(str, files)], plugins=[counted])
    if counted.not_begun:
        found.say(f"not begun for want of time: {counted.not_begun} tests")
    elif int(code) not in (0, 1) or not counted.counts["passed"]:
        found.fail(f"pytest ended with exit code {int(code)}")


def _what_conftest_lacks(folder: Path) -> str | None:
    """Why `conftest.py` cannot be imported, or None; in another process, for pytest wants to import
    its plugins itself."""
    paths = os.pathsep.join([str(folder / "helpers"), os.environ.get("PYTHONPATH", str(ROOT))])
    done = subprocess.run(
        [sys.executable, "-c", "import tiny_runs, tiny_wan"],
        env=dict(os.environ, PYTHONPATH=paths),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.strip().splitlines()
    return (lines or ["no reason was given"])[-1][:300] if done.returncode else None


class _Counted:
    """A pytest plugin: counts outcomes, keeps failures, and stops when the time is used up."""

    def __init__(self, found: Findings) -> None:
        self._found = found
        self._place = len(found.lines)
        self.counts: Counter[str] = Counter()
        self.not_begun = 0
        found.say("no test has ended")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            said = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
            self._found.say(said, place=self._place)
        if report.failed:
            text = str(report.longreprtext).strip().splitlines() or ["no reason"]
            reason = next((line[1:].strip() for line in text if line.startswith("E ")), text[-1])
            self._found.fail(f"{report.nodeid}: {reason[:200]}")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            text = str(report.longreprtext).strip().splitlines()
            self._found.fail(f"{report.nodeid} was not collected: {text[-1][:200]}")

    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        if self._found.left() > 0:
            return None
        self.not_begun += 1
        return True


def syncs(found: Findings) -> None:
    """Counts where the host waits for the device, from a batch on the device to after the step."""
    import tempfile

    from alignlab.experiments.compare.config import load_compare
    from alignlab.train import RunTrainer
    from alignlab.training.setup import build_run

    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output={folder}", "optim.batch_size=2", "data.frames=9"]
        config = load_compare("all_objectives", overrides)
        for variant in config.variants:
            run_config = config.run(variant, 0)
            if any(one.name in ("sara", "moalign") for one in run_config.objectives.values()):
                found.say(f"{variant}: left out, it needs a Stage 1 network")
                continue
            if found.left() < 0 or (not found.is_full and variant not in ("none", "refalign")):
                found.say(f"{variant}: not begun")
                continue
            run = build_run(run_config)
            trainer = RunTrainer(run)
            with run.branch:
                trainer.step(trainer.micro_batches())
                batches = list(trainer.micro_batches())
                waits = _waits(found.device, partial(trainer.step, batches))
            if found.device.type != "cuda":
                found.say(f"{variant}: took two steps; waits are counted on a GPU alone")
                continue
            found.row(variant, "waits in a step", "count", [sum(waits.values())])
            where = ", ".join(f"{place} x{count}" for place, count in waits.most_common(8))
            found.say(f"{variant}: {sum(waits.values())} waits in a step; {where or 'none'}")


def _waits(device: torch.device, work: Callable[[], object]) -> Counter[str]:
    """How often `work` waits for the device, by file and line."""
    import warnings

    if device.type != "cuda":
        work()
        return Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = (one for one in caught if "synchroniz" in str(one.message))
    return Counter(f"{one.filename.removeprefix(f'{ROOT}/')}:{one.lineno}" for one in said)


def attention(found: Findings) -> None:
    """Trains a Wan block with every backend, as a run's autocast has it."""
    from alignlab.models.attention_backends import Precision, available_backends

    precisions: tuple[Precision, ...] = ("bf16", "fp32") if found.is_full else ("bf16",)
    for precision in precisions:
        states = available_backends(found.device, precision=precision)
        for name, state in states.items():
            if state.ability != "missing package":
                found.say(f"{precision}, {name}: {state}"[:300])
        if states["native"].ability != "trains":
            found.fail(f"torch's own attention in {precision}: {states['native']}")


def settings(found: Findings) -> None:
    """See `settings_phase.py`."""
    from alignlab.experiments.bench.settings_phase import measure_settings

    measure_settings(found)


def share(found: Findings) -> None:
    """RefAlign's part of a step of Wan 1.3B, by implementation of its kernel."""
    from alignlab.experiments.bench.loss_share import SIZES, measure_share

    impls: list[str] = ["chunked", "triton" if found.device.type == "cuda" else "eager"]
    size = SIZES["wan2.1-1.3b" if found.is_full else "smoke"]
    steps = 3 if found.left() > 80 else 1  # of each side, after two that are not counted
    for side in measure_share(size, impls, steps=steps, device=found.device):
        found.row(f"step with RefAlign, {side.side}", "time", "s", [side.step_s])
        found.row(f"step with RefAlign, {side.side}", "share of the loss", "", [side.share])
        found.say(f"{side.side}: {side.step_s:.4g} s a step, the loss is {side.share:.2%} of it")


PHASES: dict[str, Callable[[Findings], None]] = {
    "environment": environment,
    "kernels": kernels,
    "step": step,
    "tests": tests,
    "syncs": syncs,
    "attention": attention,
    "settings": settings,
    "share": share,
}


def main(arguments: Sequence[str]) -> None:
    """Runs one phase: its name, device, size, seconds, folder of the report, file of findings."""
    name, device, size, seconds, out, path = arguments
    end_with_parent(signal.SIGKILL)  # a killed report leaves no phase behind
    found = Findings(
        Path(path),
        torch.device(device),
        is_full=size == "full",
        seconds=float(seconds),
        out=Path(out),
    )
    if device == "cpu":
        torch.set_num_threads(1)  # figures of a CPU say nothing, and the sizes are tiny
    if device == "cuda" and not torch.cuda.is_available():
        found.end("failed: torch finds no CUDA device")
        return
    try:
        PHASES[name](found)
    except ModuleNotFoundError as error:
        found.end(f"failed: package {error.name} is missing")
    except torch.OutOfMemoryError as error:
        found.end(f"failed: out of memory: {str(error).splitlines()[0][:300]}")
    else:
        found.end()


if __name__ == "__main__":
    main(sys.argv[1:])
