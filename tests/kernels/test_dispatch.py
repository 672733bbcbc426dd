"""Which implementation runs: what is asked for, or what "auto" says it took."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.kernels import dispatch, pull_push, relation


def by_pull_push(tokens_ND: Tensor, **options: Any) -> Tensor:
    ids_N = torch.arange(len(tokens_ND)) % 2
    return torch.stack(pull_push.pull_push(tokens_ND, tokens_ND.detach().flip(0), ids_N, **options))


def by_relation(tokens_ND: Tensor, **options: Any) -> Tensor:
    tokens_BTPD = tokens_ND[None, :, None]
    terms = relation.relation_distance(tokens_BTPD, tokens_BTPD.detach().flip(1), **options)
    return torch.stack(terms)[:, 0]


every_operation = pytest.mark.parametrize(
    ("module", "compute"), [(pull_push, by_pull_push), (relation, by_relation)]
)


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@every_operation
def test_auto_takes_eager_for_few_tokens_and_logs_each_choice_once(
    module: Any, compute: Any, caplog: pytest.LogCaptureFixture
) -> None:
    name = module.OPERATION.name
    few, many = torch.randn(15, 17), torch.randn(module.EAGER_TOKENS + 1, 17)
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for tokens in (few, many, few, many):
            compute(tokens)
    assert [record.getMessage() for record in caplog.records] == [
        f"{name}: eager on cpu, torch.float32, N=15, C=17",
        f"{name}: chunked on cpu, torch.float32, N={module.EAGER_TOKENS + 1}, C=17",
    ]
    assert torch.equal(compute(few), compute(few, impl="eager"))
    assert torch.equal(compute(many), compute(many, impl="chunked"))


@every_operation
def test_an_implementation_that_does_not_exist_is_refused(module: Any, compute: Any) -> None:
    with pytest.raises(ValueError, match=r"'cuda'; choose auto, eager, chunked, triton$"):
        compute(torch.randn(4, 3), impl="cuda")


@every_operation
def test_triton_that_cannot_run_is_refused_and_listed_with_the_reason(
    module: Any, compute: Any, without_triton: None
) -> None:
    assert module.OPERATION.implementations() == {
        "eager": None,
        "chunked": None,
        "triton": "needs a CUDA device",
    }
    with pytest.raises(ValueError, match="impl='triton' cannot run: needs a CUDA device"):
        compute(torch.randn(4, 3), impl="triton")


@every_operation
def test_triton_takes_no_float64(module: Any, compute: Any) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.raises(ValueError, match=r"takes float32, .* got torch\.float64"):
        compute(torch.randn(4, 3, dtype=torch.float64, device=device), impl="triton")


@every_operation
@pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter is wrong")
def test_triton_in_its_interpreter_takes_no_bfloat16(module: Any, compute: Any) -> None:
    with pytest.raises(ValueError, match="interpreter computes bfloat16 products wrongly"):
        compute(torch.randn(4, 3, dtype=torch.bfloat16), impl="triton")


@every_operation
@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_compiles_without_a_graph_break(module: Any, compute: Any, impl: Any) -> None:
    tokens = torch.randn(9, 5, requires_grad=True)
    outcomes = []
    for run in (compute, torch.compile(compute, fullgraph=True, backend="aot_eager")):
        value = run(tokens, impl=impl)
        outcomes.append((value.detach(), torch.autograd.grad(value.sum(), tokens)[0]))
    torch.testing.assert_close(outcomes[1], outcomes[0])


@every_operation
def test_auto_compiles_without_a_graph_break(module: Any, compute: Any) -> None:
    tokens = torch.randn(module.EAGER_TOKENS + 3, 5)
    compiled: Any = torch.compile(compute, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), compute(tokens))
