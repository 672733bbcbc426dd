"""Files of a comparison, written by several processes that share its folder."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from alignlab.experiments.compare import outputs as module
from alignlab.experiments.compare.result import Comparison, RunResult
from alignlab.runs.checksums import damaged_files, read_checksums
from made_comparisons import make_comparison


def test_commands_that_end_at_once_write_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(comparison: Comparison, folder: Path) -> Path:
        page, inside = folder / "report.md", folder / "inside"
        inside.mkdir()
        page.write_text(comparison.name)
        time.sleep(0.1)
        assert page.read_text() == comparison.name
        inside.rmdir()
        return page

    monkeypatch.setattr(module, "write_report", report)
    runs = [RunResult(v, 0, 1, "", {"val/flow": 1.0}, {}) for v in ("none", "fast")]
    made = [make_comparison(runs, name=name) for name in ("one", "another")]
    with ThreadPoolExecutor() as pool:
        list(pool.map(module.write_outputs, made, [tmp_path, tmp_path]))
    checksums = read_checksums(tmp_path)
    assert checksums is not None and checksums.keys() == {"comparison.json", "report.md"}
    assert not damaged_files(tmp_path, checksums)
