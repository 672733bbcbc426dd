"""`impl="auto"` on a GPU: the fastest by measured rows, `chunked` without, and never a surprise."""

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.kernels import dispatch, speed_table
from alignlab.kernels.bench.csv_file import Row, to_csv
from alignlab.kernels.pull_push import OPERATION, pull_push
from alignlab.kernels.registry import OPERATIONS
from alignlab.kernels.relation import OPERATION as RELATION
from alignlab.kernels.relation import relation_distance
from alignlab.kernels.speed_table import Size, SpeedTable, decide, read, table_of, use_rows
from made_up_rows import GPU, made_up_row, write_rows

WIDTH = 16
# Triton is interpreted where there is no GPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No rows but a test's own, nothing said before, and CPU tensors pass for those of a GPU."""
    monkeypatch.setattr(speed_table, "COMMITTED", tmp_path / "committed.csv")
    named = torch.compiler.assume_constant_result(lambda device: GPU)
    monkeypatch.setattr(dispatch, "gpu_name", named)
    for clear in (table_of.cache_clear, dispatch._tell_once.cache_clear):
        clear()
    for operation in (OPERATION, RELATION):
        operation._logged.clear()
    yield
    use_rows(None)
    table_of.cache_clear()
    for operation in (OPERATION, RELATION):
        operation._logged.clear()


def compute(tokens: int = 90, **options: Any) -> Tensor:
    """Both terms and the gradient, in one vector."""
    draw = torch.Generator().manual_seed(tokens)
    student_ND = torch.randn(tokens, WIDTH, generator=draw).to(DEVICE).requires_grad_()
    teacher_ND = torch.randn(tokens, WIDTH, generator=draw).to(DEVICE)
    ids_N = torch.arange(tokens, device=DEVICE) % 3
    terms = torch.stack(pull_push(student_ND, teacher_ND, ids_N, **options))
    (gradient,) = torch.autograd.grad(terms.sum(), student_ND)
    return torch.cat([terms.detach(), gradient.flatten()])


def lines_of(caplog: pytest.LogCaptureFixture, run: Callable[[], object]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        run()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("fastest", ["eager", "chunked", "triton"])
def test_the_fastest_is_taken_and_said(
    fastest: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names: tuple[Any, ...] = ("eager", "chunked", "triton")
    rows = [made_up_row(name, 1.0 if name == fastest else 2.0) for name in names]
    use_rows(write_rows(tmp_path / "own.csv", *rows))
    results: list[Tensor] = []
    said = lines_of(caplog, lambda: results.append(compute()))
    assert said == [
        f"pull_push: {fastest} on {DEVICE}, torch.float32, N=90, C=16 "
        "(measured with N=90, C=16, 1 at once)"
    ]
    assert torch.equal(results[0], compute(impl=fastest))
    assert not torch.equal(results[0], compute(impl="eager" if fastest != "eager" else "chunked"))


def test_rows_of_the_relation_decide_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [made_up_row("chunked", 2.0, op="relation"), made_up_row("eager", 1.0, op="relation")]
    use_rows(write_rows(tmp_path / "own.csv", *rows))
    tokens = torch.randn(1, 3, 30, WIDTH).to(DEVICE)
    said = lines_of(caplog, lambda: relation_distance(tokens, tokens))
    assert said == [
        f"relation: eager on {DEVICE}, torch.float32, N=90, C=16 (measured with N=90, C=16, 1 at "
        "once)"
    ]


def test_a_difference_within_the_noise_changes_nothing() -> None:
    size = Size("pull_push", "float32", 90, 16, 1)
    assert decide([made_up_row("chunked", 1.02), made_up_row("triton", 1.0)]) == {size: "chunked"}
    assert decide([made_up_row("chunked", 1.03), made_up_row("triton", 1.0)]) == {size: "triton"}
    both = [made_up_row("eager", 1.0), made_up_row("triton", 1.0), made_up_row("chunked", 2.0)]
    assert decide(both) == {size: "triton"}


def test_what_was_not_measured_against_chunked_decides_nothing() -> None:
    rows = [made_up_row("triton", 1.0), made_up_row("floor", 0.1), made_up_row("compile", 0.1)]
    assert decide(rows) == {}
    (chosen,) = decide([*rows, made_up_row("chunked", 0.5)]).values()
    assert chosen == "chunked"


def test_of_two_measurements_the_newer_counts() -> None:
    chunked = made_up_row("chunked", 1.0)
    old = made_up_row("triton", 0.5)
    new = made_up_row("triton", 5.0, timestamp="2026-02-01 00:00:00", commit="b")
    for rows in ([new, old, chunked], [chunked, old, new]):
        assert list(decide(rows).values()) == ["chunked"]


def sized(tokens: int, width: int = 64, matrices: int = 1) -> Size:
    return Size("relation", "bfloat16", tokens, width, matrices)


@pytest.mark.parametrize(
    ("measured", "asked", "nearest"),
    [
        ([sized(1000), sized(4000)], sized(1900), sized(1000)),
        ([sized(1000), sized(4000)], sized(2100), sized(4000)),
        ([sized(1000), sized(4000)], sized(2000), sized(4000)),  # a tie: the larger
        ([sized(1000)], sized(500), sized(1000)),
        ([sized(1000)], sized(499), None),
        ([sized(1000)], sized(2001), None),
        ([sized(1000, 64), sized(1000, 256)], sized(1000, 128), sized(1000, 256)),
        ([sized(1000, 64)], sized(1000, 129), None),
        ([sized(1000, 64, 1), sized(1000, 64, 9)], sized(1100, 64, 4), sized(1000, 64, 9)),
        ([sized(1000, 64, 1), sized(1000, 64, 9)], sized(1100, 64, 3), sized(1000, 64, 9)),
        ([sized(1000, 64, 1), sized(1000, 64, 9)], sized(1100, 64, 2), sized(1000, 64, 1)),
        ([sized(1200, 64, 9), sized(1000, 64, 1)], sized(1010, 64, 9), sized(1000, 64, 1)),
        ([sized(1000)._replace(dtype="float32")], sized(1000), None),
        ([sized(1000)._replace(operation="pull_push")], sized(1000), None),
    ],
)
def test_the_nearest_size_speaks(measured: list[Size], asked: Size, nearest: Size | None) -> None:
    for order in (measured, measured[::-1]):
        assert SpeedTable(dict.fromkeys(order, "triton")).nearest(asked) == nearest


def test_without_rows_it_is_chunked_for_any_number_of_tokens_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    few: list[Tensor] = []
    said = lines_of(caplog, lambda: few.extend(compute(n) for n in (30, 300, 30)))
    hints = [line for line in said if "no kernel was measured on Made-up GPU" in line]
    assert len(hints) == 1 and "--device cuda --install" in hints[0]
    assert [line.split(" on ")[0] for line in said if line != hints[0]] == 2 * [
        "pull_push: chunked"
    ]
    assert torch.equal(few[0], compute(30, impl="chunked"))
    assert not torch.equal(few[0], compute(30, impl="eager"))


def test_a_size_far_from_every_row_is_chunked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use_rows(write_rows(tmp_path / "own.csv", *(made_up_row(*one) for one in FASTER_TRITON)))
    (said,) = lines_of(caplog, lambda: compute(30))
    assert said.startswith(
        f"pull_push: chunked on {DEVICE}, torch.float32, N=30, C=16 (nothing near it"
    )


FASTER_TRITON: tuple[tuple[Any, float], ...] = (("chunked", 2.0), ("triton", 1.0))


def damage_number(rows: list[Row]) -> str:
    return to_csv(rows).replace("2.02", "fast")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda rows: "\x00\x01", "it has no column kernel_name|NUL"),
        (lambda rows: "", "it has no column kernel_name"),
        (lambda rows: to_csv(rows).replace("gpu_name", "device"), "it has no column gpu_name"),
        (
            lambda rows: to_csv(rows)[: len(to_csv(rows)) // 2 + 200],
            "unexpected end of data|row [23] ",
        ),
        (damage_number, "no time: "),
        (lambda rows: to_csv(rows).replace('""width""', '""breadth""'), "no size: "),
        (lambda rows: to_csv(rows).replace('""width"": 16', '""width"": 0'), "no size: "),
        (lambda rows: to_csv([row | {"torch_version": "1.2.3"} for row in rows]), "torch 1.2, Tri"),
        (lambda rows: to_csv([row | {"triton_version": "9.8"} for row in rows]), "Triton 9.8, and"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line_and_chunked(
    spoil: Callable[[list[Row]], str],
    problem: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = tmp_path / "own.csv"
    own.write_text(spoil([made_up_row(*one) for one in FASTER_TRITON]))
    use_rows(own)
    said = lines_of(caplog, lambda: (compute(), compute(80)))
    first, *others = said
    assert str(own) in first and "impl=auto takes chunked" in first and "\n" not in first
    assert re.search(problem, first)
    assert [line.split(" on ")[0] for line in others] == 2 * ["pull_push: chunked"]


def test_an_unreadable_table_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = write_rows(tmp_path / "own.csv", made_up_row("chunked", 1.0))

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(own))

    monkeypatch.setattr(Path, "open", refuse)
    use_rows(own)
    said = lines_of(caplog, lambda: (compute(), compute()))
    assert len(said) == 2 and "Permission denied" in said[0]


def test_own_rows_take_the_place_of_committed_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    committed = [made_up_row("chunked", 2.0), made_up_row("triton", 1.0)]
    other = made_up_row("eager", 0.1, gpu_name="Another GPU")
    write_rows(speed_table.COMMITTED, *committed, other)
    assert list(table_of(GPU).decisions.values()) == ["triton"]
    elsewhere = [made_up_row(*one, gpu_name="Another GPU") for one in FASTER_TRITON]
    own = write_rows(tmp_path / "own.csv", *elsewhere)
    use_rows(own)
    assert list(table_of(GPU).decisions.values()) == ["triton"]
    write_rows(own, made_up_row("chunked", 1.0), made_up_row("eager", 0.5))
    use_rows(None)
    use_rows(own)
    assert list(table_of(GPU).decisions.values()) == ["eager"]
    own.write_text("no table")
    use_rows(None)
    use_rows(own)
    first, second = lines_of(caplog, compute)
    assert "cannot be used" in first and "that came with alignlab are used" in first
    assert second.startswith("pull_push: triton on")


def test_triton_that_cannot_run_gives_way_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_rows(write_rows(tmp_path / "own.csv", *(made_up_row(*one) for one in FASTER_TRITON)))
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "triton is not installed")
    (said,) = lines_of(caplog, compute)
    assert "chunked" in said and "cannot run: triton is not installed" in said


@pytest.mark.parametrize("dynamic", [False, True])
def test_auto_by_rows_compiles_without_a_graph_break(tmp_path: Path, dynamic: bool) -> None:
    rows = made_up_row("chunked", 2.0), made_up_row("eager", 1.0)
    use_rows(write_rows(tmp_path / "own.csv", *rows))
    tokens_ND, ids_N = torch.randn(90, WIDTH), torch.arange(90) % 3

    def loss(student_ND: Tensor) -> Tensor:
        return torch.stack(pull_push(student_ND, tokens_ND, ids_N))

    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(tokens_ND + 1), loss(tokens_ND + 1))


def test_a_cpu_goes_by_tokens_whatever_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "gpu_name", lambda device: None)
    rows = [made_up_row(*one, gpu_name="cpu") for one in FASTER_TRITON]
    use_rows(write_rows(tmp_path / "own.csv", *rows))
    said = lines_of(caplog, lambda: (compute(30), compute(300)))
    assert [line.split(" on ")[0] for line in said] == ["pull_push: eager", "pull_push: chunked"]


def test_the_cpu_rule_is_what_the_committed_rows_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    rows = read(speed_table.COMMITTED)
    on_cpu = [row for row in rows if row["gpu_name"].endswith("threads")]
    decisions = decide(on_cpu)
    assert len(decisions) == 16
    for size, fastest in decisions.items():
        few = size.tokens <= OPERATIONS[size.operation].eager_tokens
        assert fastest == ("eager" if few else "chunked"), size


def test_tables_that_decide_alike_have_one_digest() -> None:
    one, two = ([made_up_row(name, ms * k) for name, ms in FASTER_TRITON] for k in (1.0, 1.1))
    first, second = SpeedTable(decide(one)), SpeedTable(decide(two))
    other = SpeedTable(decide([made_up_row("chunked", 1.0), made_up_row("triton", 3.0)]))
    assert first.digest() == second.digest() != other.digest()
    assert str(first) == f"{first.digest()} (pull_push float32: triton)"
    assert str(SpeedTable({})) == "chunked"
