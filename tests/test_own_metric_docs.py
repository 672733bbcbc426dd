"""docs/own-metric.md, followed to the letter in an empty folder."""

import csv
import json
import re
from pathlib import Path

import pytest

from followed_docs import follow, read_page
from made_packages import pip_install

TINY = (
    "data.train_clips=4 data.val_clips=2 data.frames=5 data.size=[48,48] eval.clips=2 "
    "eval.sample_clips=0 eval.generated_clips=2 eval.sample_steps=1 tracking.mlflow=none steps=2"
)
FEWER = " ".join(
    f"variants.{name}=null" for name in ("repa", "align4gen", "videorepa", "sara-masks")
)
SHORTER = {
    "train tiny": TINY,
    "compare demo": f"{TINY} seeds=[0,1] cost=null optim.batch_size=2 {FEWER}",
    "evaluate runs/tiny": "--out found.json",
}


@pytest.mark.slow
def test_the_way_from_an_empty_folder_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, additions, commands = read_page("own-metric.md")
    assert list(files) == ["my_metrics.py", "pyproject.toml"] and len(additions) == 2
    assert [" ".join(command.split()[:2]) for command in commands] == [
        "pip install",
        "alignlab doctor",
        "alignlab list",
        "alignlab train",
        "alignlab evaluate",
        "alignlab compare",
    ]
    (tmp_path / "my_metrics.py").write_text("\n\n".join([files["my_metrics.py"], *additions]))
    (tmp_path / "pyproject.toml").write_text(files["pyproject.toml"])
    installed = tmp_path / "installed"
    installed.mkdir()
    pip_install(tmp_path, installed)
    (tmp_path / "my_metrics.py").unlink()  # it is the installed one that is found

    monkeypatch.setenv("MY_ENCODER", str(tmp_path / "gone"))
    said = follow(tmp_path, commands[1:2], SHORTER)
    assert re.search(r"jerk \(package my-metrics 1.0\) +│ works", said)
    assert re.search(r"likeness \(package my-metrics 1.0\) +│ no folder .*gone", said)

    encoder = Path(__file__).parents[1] / "alignlab" / "assets" / "tiny-dino"
    monkeypatch.setenv("MY_ENCODER", str(encoder))
    said = follow(tmp_path, commands[2:], SHORTER)
    assert re.search(r"gen/jerk +│ jerk \(package my-metrics, with eval.metrics\)", said)
    stored = (tmp_path / "runs/tiny/recipe.yaml").read_text()
    assert "jerk@my-metrics" in stored and "motion@my-metrics" in stored
    metrics = json.loads((tmp_path / "runs/tiny/result.json").read_text())["metrics"]
    assert metrics["gen/motion"] > 0 and metrics["gen_real/jerk"] > 0
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert -1 <= found["gen/likeness"] <= 1
    with (tmp_path / "runs/demo/table.csv").open() as file:
        rows = {(row["variant"], row["metric"]) for row in csv.DictReader(file)}
    assert {("none", "gen/jerk"), ("refalign", "gen/jerk"), ("refalign", "gen/likeness")} <= rows
    assert "jerk (grey levels) ↓" in (tmp_path / "runs/demo/report.md").read_text()
