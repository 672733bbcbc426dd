"""`alignlab bench kernels`: what it prints and writes, and which speeds it refuses."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from alignlab.cli import app
from alignlab.environment import own_kernel_rows, use_own_kernel_rows
from alignlab.errors import UserError
from alignlab.experiments.bench.kernel_plots import Point, draw_plots, roofline_share
from alignlab.experiments.bench.kernels import KernelBench, check_installable, install_rows
from alignlab.experiments.bench.kernels import bench_kernels as measure_kernels
from alignlab.kernels import speed_table
from alignlab.kernels.bench import run as bench
from alignlab.kernels.bench.cases import Case
from alignlab.kernels.bench.csv_file import Row, to_row
from alignlab.kernels.bench.measure import Spread
from alignlab.kernels.bench.run import Measurement
from alignlab.kernels.relation import relation_distance
from made_up_rows import GPU, made_up_row

SMALL = ("--sizes", "3x20,3x40", "--widths", "16", "--blocks", "2", "--seconds", "0")


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide terminal, and nothing is compiled, which would take most of the time."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("CXX", "no-such-compiler")


def bench_kernels(out: Path, *arguments: str) -> Result:
    command = ("bench", "kernels", "--device", "cpu", "--out", str(out), *SMALL, *arguments)
    return CliRunner().invoke(app, list(command))


def refused(out: Path, *arguments: str) -> str:
    result = bench_kernels(out, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == "" and not out.exists()
    return result.stderr


def rows_in(out: Path) -> list[Row]:
    with (out / "all_benchmark_data.csv").open() as file:
        return list(csv.DictReader(file))


def test_measures_what_can_run_and_names_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = bench_kernels(out)
    assert result.exit_code == 0, result.output
    rows = rows_in(out)
    # floor has no memory
    assert len(rows) == 3 * 2 * 2 * (3 + 2)
    assert {row["kernel_provider"] for row in rows} == {"floor", "eager", "chunked"}
    assert {row["torch_version"] for row in rows} == {torch.__version__}
    assert {row["metric_unit"] for row in rows} == {"ms", "MiB"}
    for line in (
        "pull_push 3x20 C=16 L=2 float32 │ chunked",
        "left out: triton of pull_push: a CPU has only",
        "left out: compile of relation: torch.compile needs a C++ compiler",
    ):
        assert line in result.stdout
    plots = sorted(out.glob("*.svg"))
    assert [plot.name.split("_float32")[0] for plot in plots] == [
        *("local_gram", "pull_push", "relation")
    ]
    assert all(f"written: {path}" in result.stdout for path in plots)


def test_a_second_call_adds_to_the_table(tmp_path: Path) -> None:
    for impl, rows in (("floor", 4), ("chunked", 4 + 8), ("chunked", 4 + 8)):
        assert bench_kernels(tmp_path, "--op", "relation", "--impl", impl).exit_code == 0
        assert len(rows_in(tmp_path)) == rows


def test_no_speed_of_what_computes_something_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(student: Any, teacher: Any, *, impl: Any) -> Any:
        terms = relation_distance(student, teacher, impl=impl)
        return terms._replace(spatial=terms.spatial * 1.01) if impl == "chunked" else terms

    monkeypatch.setattr(bench, "relation_distance", wrong)
    message = refused(tmp_path / "out")
    assert "chunked is wrong on relation 3x20" in message and "no speed is reported" in message


def test_what_was_asked_for_by_name_must_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert "--impl triton: pull_push cannot run it here: a CPU" in refused(out, "--impl", "triton")

    def narrow(student: Any, teacher: Any, *, impl: Any) -> Any:
        if impl == "chunked":
            raise ValueError("takes widths from 32 on")
        return relation_distance(student, teacher, impl=impl)

    monkeypatch.setattr(bench, "relation_distance", narrow)
    assert "--impl chunked: takes widths from 32" in refused(
        out, "--op", "relation", "--impl", "chunked"
    )
    result = bench_kernels(out, "--op", "relation")
    assert "left out: chunked of relation, C=16: takes widths from 32 on" in result.stdout
    assert {row["kernel_provider"] for row in rows_in(out)} == {"floor", "eager"}


def test_large_cases_are_left_out_by_name(tmp_path: Path) -> None:
    limits = ("--op", "relation", "--max-gflop", "0.0003")
    result = bench_kernels(tmp_path, *limits)
    assert "left out: relation 3x40 C=16 float32: 0 GFLOP, more than --max-gflop" in result.stdout
    assert {row["x_value"] for row in rows_in(tmp_path)} == {"60"}
    result = bench_kernels(tmp_path / "other", "--op", "relation", "--max-gib", "0.0003")
    assert "left out: eager on relation 3x40 C=16 float32: needs about" in result.stdout
    eager = [r for r in rows_in(tmp_path / "other") if r["kernel_provider"] == "eager"]
    assert {row["x_value"] for row in eager} == {"60"}
    assert "no case is left" in refused(tmp_path / "none", "--max-gflop", "0")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--sizes", "3by20"), ("--sizes", "3x0"), ("--widths", "16;32"), ("--blocks", "0")],
)
def test_a_value_that_is_none_is_one_line(option: str, value: str, tmp_path: Path) -> None:
    assert f"{option} {value}: write" in refused(tmp_path / "out", option, value)


def test_cuda_must_be_there(tmp_path: Path) -> None:
    assert "there is no CUDA device" in refused(tmp_path / "out", "--device", "cuda")


def test_a_plain_call_leaves_the_committed_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("pyproject.toml", "kernels/results/all_benchmark_data.csv"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    # as at the root of a checkout
    monkeypatch.setattr("alignlab.__file__", str(tmp_path / "alignlab" / "__init__.py"))
    command = ["bench", "kernels", "--device", "cpu", "--op", "relation", "--impl", "floor"]
    assert CliRunner().invoke(app, [*command, *SMALL]).exit_code == 0
    assert rows_in(tmp_path / "runs/kernels")
    assert rows_in(tmp_path / "kernels/results") == []


def test_rows_of_another_commit_stay_and_are_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--op", "relation", "--impl", "chunked", "--impl", "floor")
    for commit in ("aaaaaaaaa", "bbbbbbbbb"):
        monkeypatch.setattr("alignlab.experiments.bench.kernels.git_commit", lambda c=commit: c)
        assert bench_kernels(tmp_path, *arguments).exit_code == 0
    rows = rows_in(tmp_path)
    commits = [row["commit"] for row in rows]
    assert commits.count("aaaaaaaaa") == commits.count("bbbbbbbbb") == len(rows) / 2
    drawn: list[Row] = []

    def draw(rows: list[Row], out: Path) -> list[Path]:
        drawn.extend(rows)
        return []

    monkeypatch.setattr("alignlab.experiments.bench.kernels.draw_plots", draw)
    assert bench_kernels(tmp_path, *arguments).exit_code == 0
    assert {row["commit"] for row in drawn} == {"bbbbbbbbb"}


def _speed(provider: Any, tokens: int, ms: float, flops: int) -> Row:
    case = Case("relation", 1, tokens, 8, 1, torch.float32)
    found = Measurement(case, provider, "full", "speed", Spread(ms, ms / 2, ms * 2), flops)
    facts = dict.fromkeys(
        ("timestamp", "alignlab_version", "torch_version", "triton_version", "commit"), ""
    )
    return to_row(found, {**facts, "gpu_name": "A Card (80GB)"})


def test_roofline_share_is_the_minimum_over_what_the_floor_does() -> None:
    rows = [
        _speed("floor", 100, 2.0, 1100),
        _speed("triton", 100, 4.0, 1000),
        _speed("triton", 200, 9.0, 4000),
    ]
    share = (1000 / 4.0) / (1100 / 2.0)
    assert roofline_share(rows, "full") == {"triton": [Point(100, share, share, share)]}
    assert roofline_share(rows, "forward") == {}


def test_plots_are_the_same_for_the_same_figures(tmp_path: Path) -> None:
    rows = [_speed("floor", n, n / 50, n * n) for n in (100, 200)]
    rows += [_speed("eager", n, n / 10, n * n) for n in (100, 200)]
    (path,) = draw_plots(rows, tmp_path)
    assert path.name == "relation_float32_a-card-80gb.svg"
    text = path.read_text()
    for label in ("relation, float32, A Card (80GB)", "roofline share (D=8)", "floor", "eager"):
        assert label in text
    assert "triton" not in text
    draw_plots(rows, tmp_path)
    assert path.read_text() == text


def test_rows_of_a_cpu_are_not_installed(tmp_path: Path) -> None:
    line = refused(tmp_path / "out", "--install")
    assert "on cpu, impl=auto goes by the number of tokens alone" in line


def test_rows_are_installed_only_with_chunked() -> None:
    settings = KernelBench(torch.device("cuda"), torch.bfloat16, 0.0, 1.0, 1.0)
    check_installable(settings)
    with pytest.raises(UserError, match="add --impl chunked"):
        check_installable(replace(settings, providers=("triton",)))


def test_installed_rows_decide_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    settings = KernelBench(
        torch.device("cpu"),
        torch.float32,
        0.0,
        1.0,
        1.0,
        sizes=((3, 20),),
        widths=(16,),
        blocks=(2,),
        providers=("eager", "chunked"),
    )
    figures = measure_kernels(settings, tmp_path / "out")
    path = install_rows(figures.rows)
    assert path == own_kernel_rows() and len(speed_table.read(path)) == len(figures.rows) == 24
    try:
        use_own_kernel_rows()
        device = figures.rows[0]["gpu_name"]
        sizes = set(speed_table.table_of(device).decisions)
        assert sizes == {
            speed_table.Size("pull_push", "float32", 60, 16, 2),
            speed_table.Size("relation", "float32", 60, 16, 1),
            speed_table.Size("local_gram", "float32", 60, 16, 1),
        }
        # what this process knew of the device before is forgotten, and its other rows are kept
        install_rows([made_up_row("chunked", 1.0), made_up_row("triton", 0.5)])
        assert list(speed_table.table_of(GPU).decisions.values()) == ["triton"]
        assert set(speed_table.table_of(device).decisions) == sizes
        path.write_text("no table")
        install_rows([made_up_row("chunked", 1.0)])
        assert f"{path} is replaced, it could not be read: it has no column" in caplog.text
        assert list(speed_table.table_of(GPU).decisions.values()) == ["chunked"]
    finally:
        speed_table.use_rows(None)
