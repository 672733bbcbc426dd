"""`alignlab runs`: what the files of runs say of them, while nothing is written."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignlab.experiments import run_table
from alignlab.experiments.cli.runs import runs as list_runs
from alignlab.experiments.run_table import GroupRow, RunRow, runs_below
from alignlab.runs import run_folder
from alignlab.runs.checksums import write_json
from alignlab.train import train
from command_line import alignlab, refused
from processes import forked
from tiny_runs import MakeConfig, TrainUntil

pytestmark = pytest.mark.usefixtures("shared_clips")


def write_run(folder: Path, steps: int = 100, *, rows: int = 0, result: int | None = None) -> Path:
    """A run of which a row is logged every ten steps, one a minute, the last one now."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"steps: {steps}\n")
    (folder / "environment.json").write_text("{}")
    begun = time.time() - 60.0 * rows
    os.utime(folder / "environment.json", (begun, begun))
    with (folder / "metrics.jsonl").open("w") as file:
        for row in range(1, rows + 1):
            values = {"step": 10 * row, "time": begun + 60.0 * row, "loss/total": 1.0 / row}
            file.write(json.dumps(values) + "\n")
    if result is not None:
        write_json(folder / "result.json", {"steps": result, "metrics": {}})
    return folder


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A comparison of which another process trains a run: 2 finished, 1 at 50 of 100, 1 waiting."""
    now = time.time()
    monkeypatch.setattr(run_table, "time", SimpleNamespace(time=lambda: now))
    group = tmp_path / "pair"
    for seed in (0, 1):
        write_run(group / "none" / f"seed-{seed}", rows=10, result=100)
    folder = write_run(group / "repa/seed-0", rows=5)
    write_run(group / "repa/seed-1")
    told, tell = os.pipe()

    def hold() -> None:
        with run_folder.only_writer(folder, wait=True):
            os.write(tell, b"held")
            time.sleep(300)

    holder = forked(hold)
    os.close(tell)
    try:
        assert os.read(told, 4) == b"held"
        yield tmp_path
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.close(told)


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def test_runs_of_the_harness_are_told_apart(
    tmp_path: Path, make_config: MakeConfig, train_until: TrainUntil
) -> None:
    train(make_config("name=whole"))
    train_until(make_config("name=killed", "steps=4", "checkpoint.every=1"), 3)
    run_folder.RunFolder.create(make_config("name=waiting"))
    before = contents(tmp_path)
    rows = {row.name: row for row in runs_below(tmp_path)}
    assert contents(tmp_path) == before
    assert list(rows) == ["killed", "waiting", "whole"]
    killed, waiting, whole = rows.values()
    assert isinstance(killed, RunRow) and isinstance(waiting, RunRow) and isinstance(whole, RunRow)
    assert (whole.state, whole.step, whole.steps) == ("finished", 2, 2)
    assert (killed.state, killed.step, killed.steps) == ("interrupted", 3, 4)
    assert (waiting.state, waiting.step, waiting.loss) == ("not begun", None, None)
    assert whole.loss is not None and whole.loss > 0 and whole.left_s is None


def test_a_run_that_an_error_ended_says_which_until_it_is_resumed(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    def fail(step: int, metrics: object) -> None:
        raise ValueError("the loss\nis not finite")

    config = make_config("name=pair/none/seed-0", "checkpoint.every=1", "eval.every=1")
    with pytest.raises(ValueError, match="the loss"):
        train(config, on_evaluation=fail)
    (group,) = runs_below(tmp_path)
    assert isinstance(group, GroupRow) and (group.state, group.num_ended) == ("error", 0)
    (run,) = group.runs
    assert (run.state, run.step, run.problem) == ("error", 1, "the loss is not finite")
    assert "error: the loss is not finite" in alignlab("runs", tmp_path).stdout
    folder = train(config)
    (group,) = runs_below(tmp_path)
    assert isinstance(group, GroupRow) and group.runs[0].state == "finished"
    assert not (folder / "error.json").exists()


def test_an_error_before_the_first_checkpoint_gives_way_to_another_recipe(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    def fail(step: int, metrics: object) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        train(make_config("checkpoint.every=2", "eval.every=1"), on_evaluation=fail)
    run_folder.RunFolder.create(make_config("optim.lr=1e-4"))
    assert [row.state for row in runs_below(tmp_path)] == ["not begun"]


def test_copies_that_mlflow_keeps_are_no_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", rows=3)
    for name in ("mlartifacts", "mlruns"):
        write_run(tmp_path / name / "1/0a1b/artifacts", rows=3)
    assert [row.name for row in runs_below(tmp_path)] == ["mine"]


def test_a_narrow_terminal_cuts_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    write_run(tmp_path / "a_name_that_is_longer_than_its_column", rows=3)
    list_runs(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    cells = [line.split("│")[1] for line in lines[3:-1]]
    assert "".join(cell.strip() for cell in cells) == "a_name_that_is_longer_than_its_column"


def test_a_comparison_is_a_line_with_its_running_run_below(held: Path) -> None:
    before = contents(held)
    result = alignlab("runs", held)
    assert result.exit_code == 0, result.output
    assert contents(held) == before
    cells = [
        [cell.strip() for cell in line.strip()[1:-1].split("│")]
        for line in result.stdout.splitlines()
        if line.startswith("│")
    ]
    # given below the group because it is the only one; 50 steps at 6 s, then 100 more
    group, *runs = cells
    assert group == ["pair (comparison)", "running", "2 of 4 runs", "", "15 min"]
    assert ["repa/seed-0", "running", "50 of 100", "0.2000", "5 min"] in runs
    assert ["repa/seed-1", "not begun", "0 of 100", "", ""] in runs


def test_among_others_a_group_lists_what_is_neither_finished_nor_waiting(held: Path) -> None:
    write_run(held / "alone", rows=3)
    lines = alignlab("runs", held).stdout
    assert "none/seed-0" not in lines and "repa/seed-1" not in lines and "repa/seed-0" in lines
    assert "none/seed-0" in alignlab("runs", held, "--all").stdout
    (row,) = [line for line in lines.splitlines() if "alone" in line]
    assert "interrupted" in row and "30 of 100" in row and "0.3333" in row


def test_json_has_every_run(held: Path) -> None:
    (group,) = json.loads(alignlab("runs", held, "--json").stdout)
    assert (group["name"], group["finished"], group["planned"]) == ("pair", 2, 4)
    runs = {run["name"]: run for run in group["runs"]}
    assert len(runs) == 4
    assert runs["repa/seed-0"]["left_s"] == pytest.approx(300.0, abs=1.0)
    assert runs["none/seed-0"]["state"] == "finished"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("recipe.yaml", b"steps: [", "recipe.yaml: "),
        ("recipe.yaml", b"\xff\xfe", "recipe.yaml: "),
        ("recipe.yaml", None, "recipe.yaml: it is missing"),
        ("metrics.jsonl", b"no row\n", "metrics.jsonl: "),
        ("result.json", b"", "result.json: it is empty"),
        ("result.json", b'{"steps": "many"}', "result.json: it has no steps"),
    ],
)
def test_a_damaged_file_is_a_word_in_its_row(
    tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    write_run(tmp_path / "whole", rows=10, result=100)
    broken = write_run(tmp_path / "broken\nrun", rows=10)
    if content is None:
        (broken / name).unlink()
    else:
        (broken / name).write_bytes(content)
    result = alignlab("runs", tmp_path)
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.stdout.splitlines() if "damaged" in line]
    assert r"broken\nrun" in row and f"damaged: {problem}" in row
    assert "finished" in result.stdout


def test_a_damaged_run_counts_as_unfinished_in_its_group(tmp_path: Path) -> None:
    write_run(tmp_path / "pair/none/seed-0", rows=10, result=100)
    (write_run(tmp_path / "pair/none/seed-1", rows=10) / "result.json").write_text("{")
    (group,) = runs_below(tmp_path)
    assert isinstance(group, GroupRow)
    assert (group.num_ended, group.planned, group.state) == (1, 2, "interrupted")


def test_a_sweep_counts_what_its_recipe_plans_and_knows_pruned_trials(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    write_run(sweep / "trial-0000/seed-0", rows=10, result=100)
    pruned = write_run(sweep / "trial-0001/seed-0", rows=3)
    write_json(pruned / "error.json", {"error": "no room"})  # the sweep says how a trial ended
    write_run(sweep / "trial-0002/seed-0", rows=4)
    (sweep / "recipe.yaml").write_text("space: {}\ntrials: 4\nseeds: [0]\n")
    (sweep / "trials.csv").write_text(
        "trial,state,same_as,folder\n0,complete,,trial-0000\n1,pruned,,trial-0001\n"
        "2,running,,trial-0002\n3,waiting,,trial-0003\n"
    )
    (group,) = runs_below(tmp_path)
    assert isinstance(group, GroupRow)
    assert (group.kind, group.num_ended, group.planned) == ("sweep", 2, 4)
    assert [run.state for run in group.runs] == ["finished", "pruned", "interrupted"]


def test_a_comparison_without_its_report_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "pair/none/seed-0", rows=10, result=100)
    (group,) = runs_below(tmp_path / "pair")
    assert isinstance(group, GroupRow)
    assert (group.name, group.state) == ("pair", "no report")
    (tmp_path / "pair/comparison.json").write_text("{}")
    assert [row.state for row in runs_below(tmp_path)] == ["finished"]


def test_a_resumed_runs_estimate_leaves_out_the_time_between(held: Path) -> None:
    """The log has rows of last week; the process that trains began three minutes ago."""
    folder = held / "pair/repa/seed-0"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        row["time"] -= 7 * 86_400
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,) = runs_below(held)
    assert isinstance(group, GroupRow)
    (running,) = [run for run in group.runs if run.state == "running"]
    assert running.left_s == pytest.approx(300.0, abs=1.0)


def test_folders_that_hold_no_runs(tmp_path: Path) -> None:
    assert "no such folder" in refused("runs", tmp_path / "none")
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in refused("runs", tmp_path / "file")
    assert alignlab("runs", tmp_path).stdout == f"no runs below {tmp_path}\n"


def test_links_are_followed_once(tmp_path: Path) -> None:
    write_run(tmp_path / "disk/far", rows=3)
    (tmp_path / "runs").mkdir()
    os.symlink(tmp_path / "disk/far", tmp_path / "runs/near")
    os.symlink(tmp_path / "runs", tmp_path / "runs/loop")
    assert [row.name for row in runs_below(tmp_path / "runs")] == ["near"]
    write_run(tmp_path / "runs/loops/run")
    os.symlink(tmp_path / "runs", tmp_path / "runs/loops/up")
    assert [row.name for row in runs_below(tmp_path / "runs")] == ["loops/run", "near"]


def test_it_loads_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rows=3)
    code = (
        "import sys; from alignlab.experiments.run_table import runs_below\n"
        f"assert len(runs_below(__import__('pathlib').Path({str(tmp_path)!r}))) == 1\n"
        "print(sorted({'torch', 'optuna', 'pydantic', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
