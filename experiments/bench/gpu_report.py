"""One report on a borrowed GPU: phases in processes of their own, within minutes, in one folder.

A phase that crashes, hangs or lacks a package loses itself alone, and the report says so. Each has
a time limit and is left out where the time is used up; the most valuable come first. This file
needs nothing but Python, also where half of alignlab's packages are missing:

    PYTHONPATH=. python -m alignlab.experiments.bench.gpu_report --device cuda --out gpu-report

What each phase measures is in `gpu_phases.py`.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 9.0
LIMIT_MIB = 14.0
TAIL_BYTES = 2**16  # of what a phase printed
CLOSING_S = 12.0  # kept for the report itself
LEAST_S = 8.0  # less is not worth the start of a phase
COLUMNS = ("phase", "what", "quantity", "unit", "median", "least", "most", "count")
PASSED, SKIPPED = "passed", "skipped"
REPORT, TABLE, LOG = "report.md", "figures.csv", "log.txt"


@dataclass(frozen=True)
class Phase:
    """One part of the report.

    Args:
        name: as `gpu_phases.py` knows it.
        question: what it answers.
        seconds: the most that it may take of 9 minutes; with more of them it may take more.
        command: what is run in place of `gpu_phases.py`, with its arguments.
    """

    name: str
    question: str
    seconds: float
    command: tuple[str, ...] = ()


PHASES = (
    Phase("environment", "Which device, driver, versions and code; what the device can do", 40),
    Phase("kernels", "Are the kernels right, and which is the fastest at real sizes", 140),
    Phase("step", "What a step of Wan 1.3B takes, with encoders live and with all encoded", 165),
    Phase("tests", "Do the tests for a GPU pass", 100),
    Phase("syncs", "Does a step wait for the device", 45),
    Phase("attention", "Which attention backends train under autocast", 45),
    Phase("settings", "Do the settings of memory and speed train as the defaults do", 90),
    Phase("share", "Which part of a step the alignment loss takes", 110),
)


@dataclass
class Outcome:
    """What became of a phase.

    Args:
        phase: which.
        verdict: `passed`, or what happened instead.
        seconds: that it took.
        lines: what it found.
        rows: figures, by `COLUMNS`.
    """

    phase: Phase
    verdict: str
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        """Whether it neither passed nor was left out for want of time."""
        return self.verdict != PASSED and not self.verdict.startswith(SKIPPED)


def gpu_report(
    out: Path, *, device: str, size: str, minutes: float, phases: Sequence[Phase] = PHASES
) -> list[Outcome]:
    """Runs the phases and writes the folder; `report.md` is written anew after each.

    Args:
        out: folder, made if it is missing; files of an earlier report are replaced.
        device: `cuda` or `cpu`.
        size: `full` (Wan 1.3B, real token counts) or `smoke` (tiny, to try the report itself).
        minutes: all phases and the report end within.
        phases: in order.

    Raises:
        KeyboardInterrupt, SystemExit: it was stopped; what was found until then is written.
    """
    deadline = time.monotonic() + 60 * minutes - CLOSING_S
    parts = out / ".parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    for name in (REPORT, TABLE, LOG):
        (out / name).unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    settings = f"--device {device} --size {size} --minutes {minutes:g}"

    def write() -> None:
        _write_table(out / TABLE, outcomes)
        (out / REPORT).write_text(report_text(outcomes, phases, settings), encoding="utf-8")

    try:
        for phase in phases:
            left = deadline - time.monotonic()
            if left < LEAST_S:
                outcomes.append(Outcome(phase, f"{SKIPPED}: the time was used up"))
            else:
                print(f"{phase.name}: {phase.question}", flush=True)
                limit = phase.seconds * max(1.0, minutes / MINUTES)
                _run(phase, out, device, size, min(limit, left), outcomes)
                print(f"{phase.name}: {outcomes[-1].verdict}", flush=True)
            write()
    finally:
        shutil.rmtree(parts, ignore_errors=True)
        write()
        _cut_to_size(out)
    return outcomes


def _run(
    phase: Phase, out: Path, device: str, size: str, seconds: float, outcomes: list[Outcome]
) -> None:
    """Runs a phase and appends what became of it, also when the report is stopped meanwhile."""
    module = "alignlab.experiments.bench.gpu_phases"
    findings, printed = (
        out.resolve() / ".parts" / f"{phase.name}.{end}" for end in ("json", "log")
    )
    arguments = (phase.name, device, size, f"{seconds:.1f}", str(out.resolve()), str(findings))
    command = phase.command or (sys.executable, "-m", module)
    begin = time.monotonic()
    verdict = "stopped with the report"
    try:
        code = _wait((*command, *arguments), printed, seconds)
        verdict = _verdict(code, seconds, printed)
    finally:
        outcome = Outcome(phase, verdict, time.monotonic() - begin)
        _read_findings(findings, outcome)
        outcomes.append(outcome)
        _keep_tail(printed, out / LOG, f"{phase.name}: {outcome.verdict}")


def _wait(command: Sequence[str], printed: Path, seconds: float) -> int | None:
    """The exit code of a command; None: it was killed, with all that it started, for its limit."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), PYTHONUNBUFFERED="1")
    with printed.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=ROOT,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended and left nothing behind
            process.wait()


def _verdict(code: int | None, seconds: float, printed: Path) -> str:
    if code is None:
        return f"timed out after {seconds:.0f} s and was killed"
    if code == 0:
        return PASSED
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    lines = [line for line in _tail(printed).splitlines() if line.strip()]
    return f"crashed: {lines[-1].strip()[:300] if lines else f'exit code {code}'}"


def _read_findings(path: Path, outcome: Outcome) -> None:
    """What a phase wrote while it ran; after a crash, until then."""
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    outcome.lines, outcome.rows = found["lines"], found["rows"]
    if found["verdict"] is not None and not outcome.verdict.startswith(("crashed: SIG", "timed")):
        outcome.verdict = found["verdict"]


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def _keep_tail(printed: Path, log: Path, title: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"=== {title}\n{_tail(printed) if printed.exists() else ''}\n")


def _write_table(path: Path, outcomes: Sequence[Outcome]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for outcome in outcomes:
            writer.writerows({"phase": outcome.phase.name} | row for row in outcome.rows)


def report_text(outcomes: Sequence[Outcome], phases: Sequence[Phase], settings: str) -> str:
    """The report as Markdown: a table of verdicts, then what each phase found."""
    lines = [
        "# GPU report",
        "",
        f"`{settings}`, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}. Figures: `{TABLE}`, kernels: "
        f"`kernels.csv`; what was printed: `{LOG}`.",
        "",
        "| phase | answers | verdict | seconds |",
        "|---|---|---|---:|",
    ]
    known = {outcome.phase.name: outcome for outcome in outcomes}
    for phase in phases:
        outcome = known.get(phase.name, Outcome(phase, "not begun"))
        cells = (phase.name, phase.question, outcome.verdict, f"{outcome.seconds:.0f}")
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    for outcome in outcomes:
        found = [f"- {line}" for line in outcome.lines] or ["- nothing"]
        lines += ["", f"## {outcome.phase.name}: {outcome.verdict}", "", *found]
    return "\n".join(lines) + "\n"


def _cut_to_size(out: Path) -> None:
    """Removes the largest files until the folder is small enough, and says so in the report."""
    report = out / REPORT
    files = sorted(
        (path for path in out.rglob("*") if path.is_file() and path != report),
        key=lambda path: path.stat().st_size,
    )
    room = LIMIT_MIB * 2**20 - report.stat().st_size - 2**12
    removed = []
    while files and sum(path.stat().st_size for path in files) > room:
        largest = files.pop()
        mib = largest.stat().st_size / 2**20
        removed.append(f"- removed: {largest.relative_to(out)} ({mib:.1f} MiB)")
        largest.unlink()
    if removed:
        title = f"## Larger than {LIMIT_MIB:g} MiB"
        with report.open("a", encoding="utf-8") as file:
            file.write("\n".join(["", title, "", *removed]) + "\n")


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_outcomes(outcomes: Sequence[Outcome], out: Path) -> int:
    """Prints verdicts and the path of the report; gives the exit code: 1 where a phase is bad."""
    width = max(len(outcome.phase.name) for outcome in outcomes)
    for outcome in outcomes:
        name = outcome.phase.name.ljust(width)
        print(f"{name}  {outcome.seconds:5.0f} s  {outcome.verdict}")
    print(f"report: {out / REPORT}")
    return int(any(outcome.is_bad for outcome in outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command without alignlab's command line, which needs more packages."""
    parser = argparse.ArgumentParser(description="Measure what is open on this machine's GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "smoke"), default="full")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    given: Mapping[str, Any] = vars(parser.parse_args(arguments))
    with _stopped_by_sigterm():
        outcomes = gpu_report(**given)
    return print_outcomes(outcomes, given["out"])


if __name__ == "__main__":
    raise SystemExit(main())
