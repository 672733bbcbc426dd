"""The Python example and the commands of docs/results.md, on a comparison that nobody trained."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from command_line import alignlab
from recipe_comparisons import recipe_comparison, written

DOCS = Path(__file__).parents[3] / "docs" / "results.md"


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    variants = ("none", "refalign", "repa")
    written(recipe_comparison(variants, (0, 1, 2)), Path("runs/demo"))
    written(recipe_comparison(variants, (3, 4)), Path("runs/demo_more_seeds"))


def test_the_example_of_the_docs_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    plt.switch_backend("agg")
    names: dict[str, object] = {}
    exec(example, names)
    plt.close("all")
    final, claims = names["final"], names["claims"]
    assert isinstance(final, pd.DataFrame) and final["val/flow"].notna().all()
    assert isinstance(claims, pd.DataFrame) and "better" in set(claims["change"])
    assert Path("forest.png").stat().st_size > 1000


def test_the_commands_of_the_docs_run() -> None:
    lines = re.findall(r"^ {4}(alignlab .+)$", DOCS.read_text(), flags=re.M)
    assert len(lines) == 4
    for line in lines:
        result = alignlab(*shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"
    assert Path("runs/demo_all/report.html").is_file()
