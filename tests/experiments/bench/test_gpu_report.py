"""The GPU report: whatever a phase does, the others run and the report says what became of it."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignlab.experiments.bench import gpu_phases, gpu_report
from alignlab.experiments.bench.gpu_report import Outcome, Phase
from alignlab.experiments.bench.gpu_report import main as report_of
from processes import is_running

ROOT = Path(__file__).parents[3]

FINDS = """
import json, sys
row = {"what": "a, b", "quantity": "time", "unit": "s", "median": "1", "least": "1", "most": "2"}
found = {"verdict": VERDICT, "lines": ["it is | so"], "rows": [row | {"count": 3}]}
open(sys.argv[6], "w").write(json.dumps(found))
open(sys.argv[5] + "/" + sys.argv[1] + ".bin", "wb").write(bytes(SIZE))
"""


def finds(name: str, verdict: str | None = "passed", then: str = "", size: int = 10) -> Phase:
    """A phase that writes findings and a file, and then does something."""
    code = FINDS.replace("VERDICT", repr(verdict)).replace("SIZE", str(size)) + then
    return Phase(name, "Does it?", 60.0, (sys.executable, "-S", "-c", code))


def run(out: Path, *phases: Phase, minutes: float = 9.0) -> dict[str, Outcome]:
    outcomes = gpu_report.gpu_report(
        out, device="cpu", size="smoke", minutes=minutes, phases=phases
    )
    return {outcome.phase.name: outcome for outcome in outcomes}


def shell(name: str, command: str, seconds: float = 60.0) -> Phase:
    return Phase(name, "Does it?", seconds, ("sh", "-c", command))


def test_a_crash_loses_that_phase_alone_and_what_it_found_is_kept(tmp_path: Path) -> None:
    outcomes = run(
        tmp_path,
        finds("killed", None, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        finds("raised", None, "raise ValueError('too odd')"),
        shell("silent", "exit 7"),
        finds("failed", "failed: wrong numbers"),
        finds("passed"),
    )
    assert {name: outcome.verdict for name, outcome in outcomes.items()} == {
        "killed": "crashed: SIGSEGV",
        "raised": "crashed: ValueError: too odd",
        "silent": "crashed: exit code 7",
        "failed": "failed: wrong numbers",
        "passed": "passed",
    }
    text = (tmp_path / "report.md").read_text()
    assert text.count("- it is | so") == 4
    assert "| killed | Does it? | crashed: SIGSEGV |" in text
    with (tmp_path / "figures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["killed", "raised", "failed", "passed"]
    assert rows[0]["what"] == "a, b" and rows[0]["count"] == "3"
    assert "ValueError: too odd" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / ".parts").exists()
    assert gpu_report.print_outcomes(list(outcomes.values()), tmp_path) == 1
    assert gpu_report.print_outcomes([outcomes["passed"]], tmp_path) == 0


def test_a_hang_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    hang = f"sleep 1000 & echo $! > {child}; sleep 1000"
    outcomes = run(tmp_path / "out", shell("hangs", hang, 2.0), finds("next"))
    assert outcomes["hangs"].verdict == "timed out after 2 s and was killed"
    assert outcomes["next"].verdict == "passed"
    assert not is_running(int(child.read_text()))


def test_what_no_time_is_left_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "CLOSING_S", 0.0)
    monkeypatch.setattr(gpu_report, "LEAST_S", 3599.0)
    outcomes = run(tmp_path, shell("first", "sleep 1.2"), finds("second"), minutes=60.0)
    assert outcomes["first"].verdict == "passed"
    assert outcomes["second"].verdict == "skipped: the time was used up"
    assert (
        "| second | Does it? | skipped: the time was used up | 0 |"
        in (tmp_path / "report.md").read_text()
    )
    assert gpu_report.print_outcomes(list(outcomes.values()), tmp_path) == 0


def test_a_phase_gets_no_more_than_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "CLOSING_S", 0.0)
    monkeypatch.setattr(gpu_report, "LEAST_S", 0.5)
    outcomes = run(tmp_path, shell("long", "sleep 1000", 1000.0), minutes=2 / 60)
    assert outcomes["long"].verdict == "timed out after 2 s and was killed"


def test_the_folder_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "LIMIT_MIB", 0.5)
    run(tmp_path, finds("large", size=2**20), finds("middle", size=2**18), finds("small"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2**19
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"report.md", "figures.csv", "log.txt", "middle.bin", "small.bin"}
    assert "- removed: large.bin (1.0 MiB)" in (tmp_path / "report.md").read_text()


def test_what_is_printed_is_kept_to_its_end(tmp_path: Path) -> None:
    run(tmp_path, shell("loud", "head -c 3000000 /dev/zero | tr '\\0' 'x'; echo the end"))
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 2 * gpu_report.TAIL_BYTES and log.rstrip().endswith("the end")


def test_a_stopped_report_says_where_it_was(tmp_path: Path) -> None:
    stop = shell("stopped", "kill -TERM $PPID; sleep 1000")
    with gpu_report._stopped_by_sigterm(), pytest.raises(SystemExit):
        run(tmp_path, finds("before"), stop, finds("after"))
    text = (tmp_path / "report.md").read_text()
    assert "| before | Does it? | passed |" in text
    assert "| stopped | Does it? | stopped with the report |" in text
    assert "| after | Does it? | not begun |" in text


def test_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    run(tmp_path, finds("one"))
    run(tmp_path, finds("other"))
    assert "one" not in (tmp_path / "report.md").read_text()
    assert "=== one" not in (tmp_path / "log.txt").read_text()


def test_it_starts_without_any_package() -> None:
    code = "import alignlab.experiments.bench.gpu_report as r; print(len(r.PHASES))"
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "8\n", done.stderr


def test_every_phase_is_there() -> None:
    assert [phase.name for phase in gpu_report.PHASES] == list(gpu_phases.PHASES)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ModuleNotFoundError("No module named 'diffusers'", name="diffusers"), "package diffusers"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "CUDA out of memory. Tried"),
    ],
)
def test_a_missing_package_and_too_little_memory_are_one_line(
    error: Exception, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def phase(found: gpu_phases.Findings) -> None:
        found.say("a beginning")
        raise error

    monkeypatch.setitem(gpu_phases.PHASES, "step", phase)
    findings = tmp_path / "found.json"
    gpu_phases.main(["step", "cpu", "smoke", "5", str(tmp_path), str(findings)])
    outcome = Outcome(gpu_report.PHASES[2], "passed")
    gpu_report._read_findings(findings, outcome)
    assert outcome.verdict.startswith("failed: ") and verdict in outcome.verdict
    assert "\n" not in outcome.verdict and outcome.lines == ["a beginning"]


def test_without_the_device_every_phase_says_so(tmp_path: Path) -> None:
    findings = tmp_path / "found.json"
    gpu_phases.main(["kernels", "cuda", "smoke", "5", str(tmp_path), str(findings)])
    assert "torch finds no CUDA device" in findings.read_text()


def test_a_kernel_that_is_wrong_fails_its_phase_and_has_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignlab.kernels.bench import check

    def wrong(case: object, provider: str, device: object) -> None:
        if provider == "chunked":
            raise check.WrongResult(f"chunked is wrong on {case}")

    monkeypatch.setattr(check, "check", wrong)
    cpu = torch.device("cpu")
    found = gpu_phases.Findings(None, cpu, is_full=False, seconds=600.0, out=tmp_path)
    gpu_phases.kernels(found)
    found.end()
    assert "FAILED: chunked is wrong on pull_push 3x20 C=16 L=2 float32" in found.lines
    table = (tmp_path / "kernels.csv").read_text()
    assert ",eager," in table and ",chunked," not in table
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_a_setting_that_does_not_train_as_the_default_fails_its_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignlab.experiments.bench import settings_phase

    tried = {
        settings_phase.BASE: (),
        "gradient_checkpointing ops": ("model.gradient_checkpointing=ops",),
        "offload": ("optim.offload=true",),
        "refused": ("model.attention=flash_varlen",),
        "other": ("optim.lr=0.9", "optim.warmup=0"),
    }
    monkeypatch.setattr(settings_phase, "SETTINGS", tried)
    cpu = torch.device("cpu")
    found = gpu_phases.Findings(None, cpu, is_full=False, seconds=600.0, out=tmp_path)
    settings_phase.measure_settings(found, list(tried))
    default, alike, offload, refused, other = found.lines
    loss = default.split()[4]
    assert alike.startswith(f"gradient_checkpointing ops: loss {loss} 0.00e+00 off")
    assert offload == "offload: left out, it is for a GPU"
    assert refused.startswith("FAILED: refused: model.attention: ")
    assert other.startswith("FAILED: other: loss ")
    assert [row["what"] for row in found.rows][::2] == [
        settings_phase.BASE,
        "gradient_checkpointing ops",
        "other",
    ]


@pytest.mark.slow
def test_the_whole_report_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--device", "cpu", "--size", "smoke", "--out", str(out), "--minutes", "30"]
    code = report_of(arguments)
    text = (out / "report.md").read_text()
    assert code == 0, text
    assert text.count("| passed |") == len(gpu_report.PHASES)
    files = {path.name for path in out.iterdir()}
    assert files == {
        *("report.md", "figures.csv", "log.txt", "environment.json"),
        *("kernels.csv", "kernels.png", "step.png"),
    }
    for part in ("lora, encoded live", "full, encoded before", "text encoder", "chunked"):
        assert part in (out / "figures.csv").read_text()
