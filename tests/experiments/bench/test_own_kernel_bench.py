"""`alignlab bench kernels` of implementations that are not alignlab's: right, wrong, broken."""

import csv
import sys
from pathlib import Path

import pytest
from typer.testing import Result

from alignlab.experiments.bench.loss_share import check_impls
from command_line import alignlab, refused
from made_packages import TINY_KERNEL, kernel_package

SMALL = ("--sizes", "3x20", "--widths", "16", "--blocks", "2", "--seconds", "0", "--device", "cpu")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder holds `my_kernel.py` alone; nothing is compiled."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "my_kernel.py").write_text(TINY_KERNEL.read_text())
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_kernel", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")


def bench(*arguments: str) -> Result:
    return alignlab("bench", "kernels", *SMALL, "--out", "out", *arguments)


def no_speed(*arguments: str) -> str:
    line = refused("bench", "kernels", *SMALL, "--out", "out", *arguments)
    assert not Path("out").exists()
    return line


def measured() -> dict[str, set[str]]:
    """The operations that each implementation was timed on."""
    providers: dict[str, set[str]] = {}
    with Path("out/all_benchmark_data.csv").open() as file:
        for row in csv.DictReader(file):
            providers.setdefault(row["kernel_provider"], set()).add(row["kernel_name"])
    return providers


def test_a_function_of_the_current_folder_is_measured_without_an_installation() -> None:
    mine = "my_kernel:pull_push_by_product"
    result = bench("--op", "pull_push", "--impl", mine, "--impl", "chunked", "--impl", "floor")
    assert result.exit_code == 0, result.output
    assert measured() == {name: {"pull_push"} for name in ("floor", "chunked", mine)}
    assert f"pull_push 3x20 C=16 L=2 float32 │ {mine}" in result.stdout
    (plot,) = Path("out").glob("*.svg")
    assert f">{mine}</text>" in plot.read_text()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "too_much_push",
            "my_kernel:too_much_push is wrong, C=16: pull_push, accuracy, 63 tokens, float32: a "
            "term is off by ",
        ),
        ("overwrites_the_teacher", "inputs stay, 100 tokens, float32: it writes into its argument"),
        ("two_arguments", "pull_push cannot run it here: it takes (student, teacher), and is call"),
        ("three_terms", "--impl my_kernel:three_terms: pull_push: impl=three_terms gave a tuple"),
        ("raises", "it raised RuntimeError: no kernel image (my_kernel.py:"),
        ("NOTHING", "cannot load my_kernel:NOTHING: module 'my_kernel' has no attribute"),
        ("BOTH", "my_kernel:BOTH is no function"),
    ],
)
def test_a_function_that_is_wrong_is_told_in_one_line(function: str, message: str) -> None:
    line = no_speed("--op", "pull_push", "--impl", f"my_kernel:{function}")
    assert message in line
    if function == "too_much_push":
        assert "most at push, sample " in line and "no speed is reported" in line


def test_a_gradient_that_is_wrong_at_one_token_has_no_speed() -> None:
    line = no_speed("--op", "relation", "--impl", "my_kernel:one_wrong_sample")
    assert "the gradient is off by " in line and "most at sample 1, frame 6, token 8" in line


def test_what_a_name_means_must_be_clear() -> None:
    line = no_speed("--impl", "my_kernel:pull_push_by_product")
    assert "say which operation it computes: --op pull_push or --op relation" in line
    line = no_speed("--op", "relation", "--impl", "no_kernel:f")
    assert "--impl no_kernel:f: cannot load no_kernel:f: No module named 'no_kernel'" in line
    line = no_speed("--impl", "chunkd")
    assert "--impl chunkd: unknown implementation 'chunkd', did you mean 'chunked'?" in line
    assert "or a function as module:function" in line


def test_an_installed_one_is_measured_by_its_name_on_its_operation(tmp_path: Path) -> None:
    with kernel_package(tmp_path / "installed", mine="tiny_kernel:BY_PRODUCT"):
        result = bench("--impl", "mine", "--impl", "chunked")
        assert result.exit_code == 0, result.output
        assert measured() == {
            "chunked": {"pull_push", "relation", "local_gram"},
            "mine": {"pull_push"},
        }
        assert "left out: mine of relation: no package registers it for relation" in result.stdout
        line = refused("bench", "kernels", *SMALL, "--op", "relation", "--impl", "mine")
        assert "--impl mine: relation cannot run it here: no package registers it" in line


def test_it_may_be_named_as_a_recipe_names_it(tmp_path: Path) -> None:
    with (
        kernel_package(tmp_path / "one", mine="tiny_kernel:BY_PRODUCT"),
        kernel_package(tmp_path / "two", "more-kernels", mine="tiny_kernel:RELATION"),
    ):
        result = bench("--op", "pull_push", "--impl", "mine@Tiny_Kernels", "--impl", "mine")
        assert result.exit_code == 0, result.output
        assert measured() == {"mine": {"pull_push"}}
        small = ("bench", "kernels", *SMALL)
        line = refused(*small, "--impl", "mine@tiny-kernels")
        assert "'mine' of relation is another package's; add --op pull_push" in line
        line = refused(*small, "--impl", "mine@quick-kernels")
        assert (
            "--impl mine@quick-kernels: 'mine' comes with the package quick-kernels, which" in line
        )
        line = refused(*small, "--impl", "fast@tiny-kernels")
        assert "package tiny-kernels registers no kernel 'fast' of pull_push" in line


def test_wrong_and_broken_ones_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    with kernel_package(
        tmp_path / "installed",
        mine="tiny_kernel:BY_PRODUCT",
        wrong="tiny_kernel:WRONG",
        needy="tiny_kernel:NEEDY",
        gone="no_such_module:X",
    ):
        result = bench("--op", "pull_push")
        assert result.exit_code == 0, result.output
        assert set(measured()) == {"floor", "eager", "chunked", "mine"}
        for line in (
            "left out: gone: package tiny-kernels registers kernel 'gone': cannot load no_such_mod",
            "left out: needy of pull_push: needs a card that nobody has",
            "left out: wrong of pull_push, C=16: wrong is wrong, C=16: pull_push, accuracy, ",
        ):
            assert line in result.stdout
        command = ("bench", "kernels", *SMALL, "--op", "pull_push", "--impl")
        assert "wrong is wrong, C=16" in refused(*command, "wrong")
        assert "cannot run it here: needs a card that nobody has" in refused(*command, "needy")
        assert "registers kernel 'gone': cannot load no_such_module:X" in refused(*command, "gone")


def test_the_share_of_an_installed_one_can_be_asked_for(tmp_path: Path) -> None:
    with kernel_package(tmp_path / "installed", mine="tiny_kernel:BY_PRODUCT"):
        assert check_impls(["chunked", "mine", "mine"]) == ["chunked", "mine"]
    line = refused("bench", "share", "--size", "smoke", "--impl", "mine")
    assert (
        "--impl mine: unknown implementation 'mine', did you mean" in line or "valid: auto" in line
    )
