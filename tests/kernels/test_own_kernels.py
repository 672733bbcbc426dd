"""Implementations of other packages: found, called, looked at; and wrong ones told by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.kernels.plugins import ImplementationError, load_function
from alignlab.kernels.pull_push import PullPush, pull_push
from alignlab.kernels.registry import OPERATIONS, installed_kernels
from alignlab.kernels.relation import relation_distance
from made_packages import kernel_package
from random_tensors import draw

IDS = torch.tensor([0, 0, 1, 1, 2, -1])


def compute(impl: Any) -> PullPush:
    return pull_push(draw(2, 6, 8).requires_grad_(), draw(6, 8, seed=1), IDS, impl=impl)


def test_an_installed_one_is_listed_and_called_by_its_name(tmp_path: Path) -> None:
    with kernel_package(tmp_path, mine="tiny_kernel:BY_PRODUCT", both="tiny_kernel:BOTH"):
        states = OPERATIONS["pull_push"].implementations()
        assert list(states) == ["eager", "chunked", "triton", "both", "mine"]
        assert states["mine"] is states["both"] is None
        assert list(OPERATIONS["relation"].implementations())[3:] == ["both"]
        for name in ("mine", "mine@tiny-kernels", "both@Tiny_Kernels"):
            terms = compute(name)
            torch.testing.assert_close(terms, compute("eager"))
            assert isinstance(terms, PullPush) and terms.push.requires_grad
        tokens = draw(1, 2, 3, 8)
        theirs = relation_distance(tokens, tokens.flip(1), impl="both")
        assert torch.equal(theirs.joint, relation_distance(tokens, tokens.flip(1)).joint)
        with pytest.raises(ImplementationError, match=r"'mine'; choose auto, .*, triton, both$"):
            relation_distance(tokens, tokens, impl="mine")
    assert "mine" not in OPERATIONS["pull_push"].implementations()


def test_auto_takes_no_foreign_one(tmp_path: Path) -> None:
    with kernel_package(tmp_path, mine="tiny_kernel:WRONG"):
        assert torch.equal(compute("auto").push, compute("eager").push)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("chunked", "tiny_kernel:BY_PRODUCT", "alignlab has that name already"),
        ("floor", "tiny_kernel:BY_PRODUCT", "alignlab has that name already"),
        ("a:b", "tiny_kernel:BY_PRODUCT", "a name is made of letters, digits, _ and -"),
        ("bad", "no_such_module:X", "cannot load no_such_module:X: No module named 'no_such_m"),
        ("bad", "tiny_kernel:NOTHING", "cannot load tiny_kernel:NOTHING: module 'tiny_kernel'"),
        ("bad", "broken_module:X", "cannot load broken_module:X: it does not work here"),
        ("bad", "tiny_kernel:raises", "tiny_kernel:raises is no alignlab.kernels.plugins.Kernel"),
        ("bad", "tiny_kernel:OTHER_OP", "of the operation 'attention': choose pull_push, relation"),
        (
            "bad",
            "tiny_kernel:SHORT",
            "tiny_kernel:SHORT takes (student, teacher), and is called with (student, teacher, "
            "subject_ids, pos_margin, neg_margin, host_ids) by position",
        ),
    ],
)
def test_a_bad_one_is_a_line_and_keeps_nothing_else_from_running(
    name: str, value: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "broken_module.py").write_text('raise RuntimeError("it does not\\nwork here")')
    with (
        kernel_package(tmp_path, "good-package", mine="tiny_kernel:BY_PRODUCT"),
        kernel_package(tmp_path, "bad-package", **{name: value}),
    ):
        (problem,) = [one.problem for one in installed_kernels() if one.problem is not None]
        assert problem.startswith(f"package bad-package registers kernel {name!r}: ")
        assert message in problem and "\n" not in problem
        compute("mine")
        compute("auto")
        if name == "bad":
            with pytest.raises(ImplementationError) as refusal:
                compute("bad")
            assert str(refusal.value) == problem


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import subprocess\nsubprocess.run(['false'], check=True)",
            "CalledProcessError: Command '['false']' returned non-zero exit status 1.",
        ),
        ("class Own(Exception): ...\nraise Own('no\\ncard')", "Own: no card"),
        ("class Own(Exception): ...\nraise Own", "Own"),
        ("import sys\nsys.exit('go away')", "SystemExit: go away"),
        (
            "from triton.runtime.errors import OutOfResources\n"
            "raise OutOfResources(9, 1, 'shared memory')",
            "OutOfResources: out of resource: shared memory",
        ),
    ],
)
def test_whatever_an_import_ends_in_is_a_line(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "failing_module.py").write_text(code)
    with (
        kernel_package(tmp_path, "good-package", mine="tiny_kernel:BY_PRODUCT"),
        kernel_package(tmp_path, "bad-package", bad="failing_module:X"),
    ):
        (problem,) = [one.problem for one in installed_kernels() if one.problem is not None]
        start = "package bad-package registers kernel 'bad': cannot load failing_module:X: "
        assert problem.startswith(start + message) and "\n" not in problem
        compute("mine")
        with pytest.raises(ImplementationError, match="cannot load failing_module:f: "):
            load_function("failing_module:f")


def test_an_operation_of_the_wrong_type_is_a_line(tmp_path: Path) -> None:
    with kernel_package(tmp_path, bad="tiny_kernel:LIST_OP"):
        (problem,) = [one.problem for one in installed_kernels() if one.problem is not None]
        assert "of the operation ['pull_push']: choose pull_push, relation" in problem
        compute("auto")


def test_two_packages_cannot_share_the_name_of_a_kernel(tmp_path: Path) -> None:
    with (
        kernel_package(tmp_path, "one", mine="tiny_kernel:BY_PRODUCT"),
        kernel_package(tmp_path, "two", mine="tiny_kernel:BOTH"),
    ):
        (problem,) = [one.problem for one in installed_kernels() if one.problem is not None]
        assert problem == "package two registers kernel 'mine': package one has that name already"
        compute("mine")
        relation_distance(draw(1, 2, 3, 8), draw(1, 2, 3, 8, seed=1), impl="mine")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("tiny_kernel:NEEDY", "needs a card that nobody has"),
        ("tiny_kernel:UNSURE", "its missing() failed: no driver"),
        ("tiny_kernel:ENDING", "its missing() failed: SystemExit: 3"),
        ("tiny_kernel:FALSE", "its missing() gave False, not None or a line of text"),
        ("tiny_kernel:SILENT", "its missing() gave '', not None or a line of text"),
    ],
)
def test_one_that_cannot_run_here_says_why(value: str, reason: str, tmp_path: Path) -> None:
    with kernel_package(tmp_path, mine=value):
        assert OPERATIONS["pull_push"].implementations()["mine"] == reason
        with pytest.raises(
            ImplementationError, match=rf"impl='mine' cannot run: {re.escape(reason)}"
        ):
            compute("mine")


def test_the_package_that_a_name_needs_is_told(tmp_path: Path) -> None:
    with kernel_package(tmp_path, mine="tiny_kernel:BY_PRODUCT"):
        with pytest.raises(ImplementationError, match="'fast' comes with the package quick-ke"):
            compute("fast@quick-kernels")
        with pytest.raises(ImplementationError, match="tiny-kernels registers no kernel 'fast' of"):
            compute("fast@tiny-kernels")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("three_terms", r"impl=three_terms gave a tuple, not the tensors \(pull, push\)"),
        ("half_terms", r"gave pull \(2,\) in torch.float16 on cpu, not \(2,\) in torch.float32"),
        ("no_gradient", r"gave \(pull, push\) without a gradient"),
    ],
)
def test_what_a_function_gives_is_looked_at(function: str, message: str, tmp_path: Path) -> None:
    with kernel_package(tmp_path):
        with pytest.raises(ImplementationError, match=message):
            compute(load_function(f"tiny_kernel:{function}"))


def test_a_foreign_one_compiles_without_a_graph_break(tmp_path: Path) -> None:
    with kernel_package(tmp_path, mine="tiny_kernel:BY_PRODUCT"):
        student, teacher = draw(6, 8), draw(6, 8, seed=1)

        def push(student: Tensor) -> Tensor:
            return pull_push(student, teacher, IDS, impl="mine").push

        compiled = torch.compile(push, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(student), push(student))
