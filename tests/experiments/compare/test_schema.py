"""comparison.json says its schema: older files are read, newer ones refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import alignlab
from alignlab.errors import UserError
from alignlab.experiments.compare.outputs import read_comparison
from alignlab.experiments.compare.result import SCHEMA, Comparison
from made_comparisons import make_comparison
from recipe_comparisons import run_of, written

DOCS = Path(__file__).parents[3] / "docs" / "results.md"


def file_of(folder: Path, **changes: Any) -> Path:
    """A comparison.json with other keys; those that are None are left out."""
    path = folder / "comparison.json"
    make_comparison([run_of("none", 0), run_of("refalign", 0)]).save(path)
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


def test_the_schema_is_the_first_key(tmp_path: Path) -> None:
    assert next(iter(json.loads(file_of(tmp_path).read_text()).items())) == ("schema", SCHEMA)


@pytest.mark.parametrize("schema", [None, 1, SCHEMA])
def test_files_of_this_version_and_of_older_ones_load(tmp_path: Path, schema: int | None) -> None:
    older = file_of(tmp_path, schema=schema, headline=["val/flow"])
    assert Comparison.load(older).variants == ("none", "refalign")


def test_a_file_of_before_schemas_loads(tmp_path: Path) -> None:
    """Such as the first version wrote it: fields with a default were not there yet."""
    optional = ("allowed", "cost", "budget", "tuning", "schema")
    path = file_of(tmp_path, **dict.fromkeys(optional))
    content = json.loads(path.read_text())
    content["results"] = [
        {k: v for k, v in run.items() if k not in ("notes", "aligned", "diverged", "measured")}
        for run in content["results"]
    ]
    path.write_text(json.dumps(content))
    found = Comparison.load(path)
    assert found.results[0].metrics == run_of("none", 0).metrics and found.cost is None


def test_a_newer_file_is_refused_by_the_version_to_get(tmp_path: Path) -> None:
    facts = {"schema": SCHEMA + 1, "environment": {"alignlab": "7.8.9"}, "commit": "abc"}
    path = file_of(tmp_path, **facts, invented=1)
    message = (
        f"{path}: schema {SCHEMA + 1}, and alignlab {alignlab.__version__} reads up to {SCHEMA}: "
        "get alignlab 7.8.9 (commit abc), which wrote it, or a later one"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Comparison.load(path)
    with pytest.raises(UserError, match="get alignlab a newer version, which wrote it"):
        Comparison.load(file_of(tmp_path, schema=99, environment=[]))


def test_what_is_no_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a comparison: .*schema: expected a whole number"):
        Comparison.load(file_of(tmp_path, schema="2"))


def test_a_changed_file_is_told(tmp_path: Path) -> None:
    folder = written(make_comparison([run_of("none", 0)]), tmp_path / "made")
    path = folder / "comparison.json"
    path.write_text(path.read_text().replace("made up", "made down"))
    with pytest.raises(UserError, match=r"comparison\.json is damaged .*remove checksums\.json"):
        read_comparison(folder)
    (folder / "checksums.json").unlink()
    assert read_comparison(path)[0].name == "made down"


def test_every_field_is_documented() -> None:
    text = DOCS.read_text()
    documented = set(re.findall(r"^\| `(\w+)`", text, flags=re.M))
    fields = {field.name for field in dataclasses.fields(Comparison)}
    assert fields | {"schema"} <= documented, "docs/results.md, and SCHEMA if they are new"
    assert f"`schema: {SCHEMA}`" in text
