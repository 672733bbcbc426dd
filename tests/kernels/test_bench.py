"""The kernel benchmark: its cases, its floor, its figures, and that it sees a wrong result."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alignlab.kernels.bench import floor as bench_floor
from alignlab.kernels.bench import measure as bench_measure
from alignlab.kernels.bench import run as bench
from alignlab.kernels.bench.cases import Case, Inputs, Op, draw_inputs, select_cases
from alignlab.kernels.bench.check import WrongResult, check
from alignlab.kernels.bench.csv_file import COLUMNS, read_rows, replace_rows, to_csv, to_row
from alignlab.kernels.bench.floor import floor_step, minimum_flops
from alignlab.kernels.bench.measure import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    peak_extra_mib,
    spread,
    time_steps,
)
from alignlab.kernels.bench.run import BYTES_PER_PAIR, MODES, measure, missing, num_steps, too_large
from alignlab.kernels.relation import relation_distance

CPU = torch.device("cpu")
SMALL: dict[Op, Case] = {
    "pull_push": Case("pull_push", 3, 40, 24, 2, torch.float32),
    "relation": Case("relation", 5, 26, 24, 1, torch.float32),
    "local_gram": Case("local_gram", 5, 28, 24, 1, torch.float32),
}
every_op = pytest.mark.parametrize("op", SMALL)
FACTS = {
    "gpu_name": "a card",
    "timestamp": "2026-01-01 00:00:00",
    "alignlab_version": "1",
    "torch_version": "2",
    "triton_version": "3",
    "commit": "abc",
}


def test_the_table_has_the_cases_of_the_papers() -> None:
    cases = select_cases(["pull_push", "relation"], torch.bfloat16)
    selected = {(case.op, case.size, case.width, case.blocks) for case in cases}
    assert len(cases) == len(selected) == 3 * 2 * 2 + 4 * 2
    assert ("pull_push", "3x1560", 1024, 9) in selected
    assert ("relation", "21x1560", 768, 1) in selected
    assert max(case.num_tokens for case in cases) == 32_760


def test_sizes_replace_those_of_the_table() -> None:
    cases = select_cases(["pull_push"], torch.float32, sizes=[(2, 7)], widths=[5], blocks=[1, 3])
    assert [str(case) for case in cases] == [
        "pull_push 2x7 C=5 L=1 float32",
        "pull_push 2x7 C=5 L=3 float32",
    ]


@every_op
def test_a_reduced_case_is_of_the_same_kind(op: Op) -> None:
    for case in select_cases([op], torch.float16):
        reduced = case.reduced()
        assert reduced.num_tokens <= 301
        kinds = [(x.op, x.groups, x.width, x.dtype, x.blocks > 1) for x in (case, reduced)]
        assert kinds[0] == kinds[1]


def test_minimum_flops_counts_the_pairs_that_matter() -> None:
    subjects = SMALL["pull_push"]
    ids = [token // subjects.tokens for token in range(subjects.num_tokens)]
    different = sum(one != other for one in ids for other in ids)
    assert minimum_flops(subjects, backward=False) == 2 * 2 * 24 * different
    frames = SMALL["relation"]
    unordered = frames.num_tokens**2 / 2
    assert minimum_flops(frames, backward=False) == 2 * 2 * 24 * unordered
    grid = SMALL["local_gram"]
    assert grid.grid == (4, 7)
    places = [(row, column) for row in range(4) for column in range(7)]
    near = sum(abs(a - c) <= 3 and abs(b - d) <= 3 for a, b in places for c, d in places)
    assert minimum_flops(grid, backward=False) == 2 * 2 * 24 * 4 * near
    for case in (subjects, frames, grid):
        assert minimum_flops(case, backward=True) == 2 * minimum_flops(case, backward=False)


@every_op
@pytest.mark.parametrize("backward", [False, True])
def test_the_floor_does_the_flops_that_it_says(
    op: Op, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench_floor.PANEL_ROWS, "cpu", 16)
    case = SMALL[op]
    step, flops = floor_step(case, CPU, backward=backward)
    with FlopCounterMode(display=False) as counted:
        step()
    assert counted.get_total_flops() == flops
    minimum = minimum_flops(case, backward=backward)
    if op == "pull_push":
        assert flops == minimum
    elif op == "relation":
        assert minimum < flops < minimum * (1 + 16 / case.num_tokens)
    else:
        assert minimum < flops == 2 * (1 + backward) * 2 * 4 * 28 * 49 * 24


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("provider", ["eager", "chunked"])
def test_a_right_result_passes(op: Op, dtype: torch.dtype, provider: Any) -> None:
    check(Case(op, 3, 500, 48, 2, dtype), provider, CPU)


@pytest.mark.slow
@every_op
def test_the_compiled_reference_passes(op: Op) -> None:
    check(SMALL[op], "compile", CPU)


def _scaled(terms: Any) -> Any:
    return type(terms)(*(1.001 * term for term in terms))


def _without_some_gradients(terms: Any) -> Any:
    return terms._replace(spatial=terms.spatial.detach())


def _nan(terms: Any) -> Any:
    return terms._replace(temporal=terms.temporal * math.nan)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_scaled, "value is off by 0.001 "),
        (_without_some_gradients, "gradient is off by"),
        (_nan, "value is off by nan"),
    ],
)
def test_a_wrong_result_is_seen(
    spoil: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(student: Tensor, teacher: Tensor, *, impl: Any) -> Any:
        terms = relation_distance(student, teacher, impl=impl)
        return spoil(terms) if impl == "chunked" else terms

    monkeypatch.setattr(bench, "relation_distance", wrong)
    with pytest.raises(WrongResult, match=f"chunked is wrong on relation 5x26 .*{message}"):
        check(SMALL["relation"], "chunked", CPU)
    check(SMALL["relation"], "eager", CPU)


def test_what_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "interpreter" in str(missing("relation", "triton", CPU))
    assert missing("pull_push", "chunked", CPU) is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no no-such-compiler" in str(missing("relation", "compile", CPU))


@pytest.mark.parametrize("op", ["pull_push", "relation"])  # the others hold no matrix of all pairs
def test_the_memory_that_is_foretold_is_about_what_eager_takes(op: Op) -> None:
    case = Case(op, 3, 250, 16, 1, torch.float32)
    figures, _ = measure(case, ["eager"], CPU, 0.0, lambda note: None)
    peak = max(f.spread.median for f in figures if f.metric == "memory") * 1024**2
    assert peak / case.num_tokens**2 == pytest.approx(BYTES_PER_PAIR[op, "eager"], rel=0.15)


def test_what_is_too_large_says_how_large() -> None:
    case = Case("relation", 21, 1560, 768, 1, torch.float32)
    assert too_large(case, "eager", 8.0) == "needs about 48.0 GiB, more than 8"
    assert too_large(case, "eager", 50.0) is None
    assert too_large(case, "chunked", 0.0) is None


def test_peak_memory_is_the_most_at_one_time() -> None:
    def step() -> Tensor:
        first = torch.empty(1024, 1024)  # 4 MiB
        second = torch.empty(512, 1024)  # 6 in all
        del first
        return torch.cat([second, second[:256]])  # 5, with the result

    assert peak_extra_mib(step, CPU) == pytest.approx(6.0, abs=0.01)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, MIN_ROUNDS), (1.9, 8), (1e9, MAX_ROUNDS)])
def test_steps_are_timed_in_turns(
    seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only the steps move, by half a second in a round of both."""
    calls, now = list[str](), 0.0

    def step(name: str, taken: float) -> None:
        nonlocal now
        calls.append(name)
        now += taken

    monkeypatch.setattr(bench_measure, "time", SimpleNamespace(perf_counter=lambda: now))
    steps = {"fast": lambda: step("fast", 0.125), "slow": lambda: step("slow", 0.375)}
    times = time_steps(steps, CPU, seconds)
    assert calls[:6] == ["fast", "slow", "fast", "slow", "slow", "fast"]
    assert len(calls) == 2 + 2 * rounds
    assert times == {"fast": (125.0, 125.0, 125.0), "slow": (375.0, 375.0, 375.0)}


def test_spread_interpolates() -> None:
    assert tuple(spread([5.0, 1.0, 2.0, 4.0, 3.0])) == pytest.approx((3.0, 1.8, 4.2))


@every_op
def test_every_provider_has_every_figure(op: Op) -> None:
    case, messages = SMALL[op], list[str]()
    providers: list[Any] = ["floor", "eager", "chunked"]
    figures, left_out = measure(case, providers, CPU, 0.0, messages.append)
    wanted = {(p, mode, "speed") for p in providers for mode in MODES}
    wanted |= {(p, mode, "memory") for p in providers[1:] for mode in MODES}
    assert {(f.provider, f.mode, f.metric) for f in figures} == wanted
    assert all(f.spread.p20 > 0 and f.flops > 0 for f in figures)
    assert left_out == [] and len(messages) == num_steps(providers)


def test_a_device_without_enough_memory_leaves_one_provider_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hungry(x: Inputs) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain = bench.loss_function
    monkeypatch.setattr(
        bench, "loss_function", lambda op, p: hungry if p == "eager" else plain(op, p)
    )
    figures, left_out = measure(
        SMALL["relation"], ["eager", "chunked"], CPU, 0.0, lambda note: None
    )
    assert {f.provider for f in figures} == {"chunked"}
    (one,) = left_out
    assert one.what.startswith("eager on relation 5x26") and "too little memory" in one.reason


def test_inputs_are_those_of_the_case_and_the_seed() -> None:
    case = SMALL["pull_push"]
    one, same, other = (draw_inputs(case, CPU, seed) for seed in (0, 0, 1))
    assert one.student.shape == (2, 120, 24) and one.teacher.shape == (120, 24)
    assert one.subject_ids is not None and one.subject_ids.bincount().tolist() == [40, 40, 40]
    assert torch.equal(one.student, same.student) and not torch.equal(one.student, other.student)
    half = draw_inputs(Case("relation", 2, 3, 4, 1, torch.bfloat16), CPU, 0)
    assert half.student.shape == (1, 2, 3, 4) and half.student.dtype == torch.bfloat16


def test_rows_have_the_columns_of_liger_kernel(tmp_path: Any) -> None:
    figures, _ = measure(SMALL["relation"], ["floor", "chunked"], CPU, 0.0, lambda note: None)
    rows = [to_row(figure, FACTS) for figure in figures]
    path = tmp_path / "rows.csv"
    assert read_rows(path) == []
    path.write_text(to_csv(rows))
    assert read_rows(path) == rows
    liger = (
        "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,"
        "x_value,y_value_50,y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp"
    )
    assert ",".join(COLUMNS).startswith(liger + ",")
    assert path.read_text().startswith(liger + ",")


def test_a_second_measurement_takes_the_place_of_the_first() -> None:
    figures, _ = measure(SMALL["relation"], ["chunked"], CPU, 0.0, lambda note: None)
    old = [to_row(figure, FACTS) for figure in figures]
    again = [{**row, "y_value_50": "7", "timestamp": "later"} for row in old]
    elsewhere = [{**row, "gpu_name": "another card"} for row in old]
    assert replace_rows(old, again) == again
    assert replace_rows(old, elsewhere) == [*old, *elsewhere]
    for fact in ("commit", "alignlab_version", "torch_version", "triton_version"):
        other = [{**row, fact: "another"} for row in old]
        assert replace_rows(old, other) == [*old, *other]
