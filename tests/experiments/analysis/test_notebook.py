"""docs/results.ipynb runs, and says what it said when it was committed."""

import ast
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot as plt

NOTEBOOK = Path(__file__).parents[3] / "docs" / "results.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of its last line if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue(), value


def test_the_notebook_runs_and_its_outputs_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    monkeypatch.chdir(NOTEBOOK.parent)
    before = matplotlib.get_backend()
    plt.switch_backend("agg")
    compared = 0
    try:
        for cell in cells:
            if cell["cell_type"] != "code":
                continue
            printed, value = run_cell("".join(cell["source"]), names)
            for output in cell["outputs"]:
                if output["output_type"] == "stream":
                    assert "".join(output["text"]) == printed
                    compared += 1
                elif output["output_type"] == "execute_result":
                    assert "".join(output["data"]["text/plain"]) == repr(value)
                    compared += 1
        assert compared == 4
        assert len(names["right"].lines) == 11, "ten seeds and zero"
        assert names["left"].get_title().startswith("validation flow loss")
    finally:
        plt.close("all")
        plt.switch_backend(before)
