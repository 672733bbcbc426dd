"""`alignlab init`: what it writes is trained as it stands, and replaces nothing."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from alignlab.config.data import FolderConfig
from alignlab.config.recipe_file import recipe_folder
from alignlab.data.registry import build_splits
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.sweep.config import load_sweep
from command_line import alignlab, refused
from documented_commands import NO_CLIPS, SMALL

pytestmark = pytest.mark.usefixtures("shared_clips")

SMALLER = [*SMALL, *NO_CLIPS, "steps=1", "seeds=[0]", "eval.clips=2", "eval.every=null"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> str:
    result = alignlab(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    return result.stdout


def test_a_comparison_is_trained_as_written(here: Path) -> None:
    assert "next: alignlab compare mine.yaml --print-config" in run("init", "compare", "mine")
    assert "name: mine" in run("compare", "mine.yaml", "--print-config")
    run("compare", "mine.yaml", *SMALLER, "cost=null")
    assert (here / "runs/mine/report.html").is_file()


def test_a_sweep_is_trained_as_written(here: Path) -> None:
    run("init", "sweep", "searches/mine.yaml")
    assert "name: mine" in run("sweep", "searches/mine.yaml", "--print-config")
    run("sweep", "searches/mine.yaml", *SMALLER, "trials=2")
    assert (here / "runs/mine/best.yaml").is_file()


def test_a_data_set_is_trained_on_as_written(here: Path) -> None:
    run("init", "data", "clips")
    train, val = build_splits(FolderConfig(name="folder", path="clips"), memory=here / "runs")
    assert (len(train), len(val)) == (3, 1)
    assert len(train[0].references) >= 2 and bool(train[0].references[0].mask_HW.any())
    with Image.open(here / "clips/references/0-0.png") as reference:
        assert reference.getchannel("A").getextrema() == (0, 255), "its background is transparent"
    readme = (here / "clips/README.md").read_text()
    assert "alignlab data preview tiny data.name=folder data.path=clips" in readme
    data = ["data.name=folder", "data.path=clips", "data.frames=5", "data.size=[48,48]"]
    run("data", "preview", "tiny", *data)
    run("train", "tiny", *data, "optim.batch_size=2", "eval.clips=1", "steps=1", *NO_CLIPS)


@pytest.mark.parametrize("kind", ["compare", "sweep"])
def test_what_stands_in_comments_can_be_put_in(kind: str, here: Path) -> None:
    """Every setting that a comment offers, without its `#`, in a recipe that is accepted."""
    run("init", kind, "mine")
    lines = []
    for line in (here / "mine.yaml").read_text().splitlines():
        bare = line.lstrip()
        is_setting = bare.startswith("# ") and ": " in bare.split("  #")[0] and "Change" not in bare
        if is_setting and not line.startswith(("#   ", "# It", "# `", "# All")):
            line = line.replace("# ", "", 1)
        lines.append(line)
    offered = yaml.safe_load("\n".join(lines))
    plain = yaml.safe_load((here / "mine.yaml").read_text())
    assert offered != plain
    offered.get("variants", {}).pop("repa-tuned", None)  # names a sweep that is not there
    if kind == "compare":
        assert offered.pop("cost") is None  # a budget is set from it
    (here / "offered.yaml").write_text(yaml.safe_dump(offered, sort_keys=False))
    if kind == "compare":
        config = load_compare(here / "offered.yaml", [])
        assert config.budget == "wall_time" and config.base.optim.accumulate == 4
    else:
        assert "optim.lr" in load_sweep(here / "offered.yaml", []).space


@pytest.mark.parametrize("kind", ["compare", "sweep"])
def test_a_file_is_never_replaced(kind: str, here: Path) -> None:
    (here / "mine.yaml").write_text("kept")
    assert "mine.yaml is there already" in refused("init", kind, "mine")
    assert "mine.yaml is there already" in refused("init", kind, "mine.yaml")
    assert (here / "mine.yaml").read_text() == "kept"
    (here / "file").write_text("kept")
    assert "file is a file" in refused("init", kind, "file/mine")


def test_a_folder_with_something_in_it_is_left_alone(here: Path) -> None:
    (here / "clips").mkdir()
    run("init", "data", "clips")  # an empty one is taken
    before = sorted((here / "clips").rglob("*"))
    assert "clips is not empty" in refused("init", "data", "clips")
    assert sorted((here / "clips").rglob("*")) == before
    (here / "file").touch()
    assert "is a file" in refused("init", "data", "file")


def test_names_that_no_run_may_have() -> None:
    assert "'my recipe' holds ' '" in refused("init", "compare", "my recipe")
    assert "a shipped recipe has that name" in refused("init", "sweep", "demo")
    assert (recipe_folder() / "demo.yaml").is_file()
