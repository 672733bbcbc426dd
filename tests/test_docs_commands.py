"""What the pages of the docs for users show is run: their recipes and their commands, shortened."""

import re
from pathlib import Path

import pytest
import yaml

from documented_commands import (
    SMALL,
    documented_commands,
    front_pages,
    run_shortened,
    untested_length,
)
from followed_docs import blocks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (
    *("start", "own-comparison", "sweeps", "gpus", "scale", "settings", "metric-table"),
    "commands",
)
# Followed by test_own_pages.py and test_own_kernel_docs.py, which install packages.
WALKED = ("own-objective", "own-teacher")
PROSE = ("index", "reading-a-report", "pitfalls", "faq")
# Lines of an indented block that are no commands of alignlab.
OTHER = (
    "make setup",
    ". .venv/bin/activate",
    "python3 -m venv .venv",
    ".venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu",
    "make gpu-report",
    "torchrun --nproc-per-node 8 --no-python alignlab train wan21_1.3b_8gpu data.path=FOLDER",
    "torchrun --nproc-per-node 8 --no-python alignlab train wan21_1.3b_8gpu data.path=FOLDER "
    "model.shard=fsdp2",
    "torchrun --nproc-per-node 8 --no-python alignlab train RECIPE",
    "srun torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
    "--no-python alignlab train RECIPE",
)
pytestmark = pytest.mark.usefixtures("shared_clips")


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text()


def test_no_command_of_a_page_trains_at_full_length() -> None:
    found = [c for page in PAGES for c in documented_commands(text_of(page))]
    assert len(found) > 20
    assert untested_length(found) == []


@pytest.mark.parametrize("page", [*PAGES, *PROSE])
def test_every_line_of_code_is_a_command_or_known(page: str) -> None:
    indented = re.sub(r"(?ms)^```.*?^```$", "", text_of(page))
    lines = re.findall(r"^ {4}(\S.*)$", indented, flags=re.M)
    unknown = [line for line in lines if not line.startswith("alignlab ") and line not in OTHER]
    assert unknown == []
    assert page in PAGES or not lines


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = text_of(page)
    files = {name: block for name, block in blocks(text) if name}
    for name, block in files.items():
        (tmp_path / name).write_text(block)
    known = documented_commands(front_pages())  # run by test_readme.py
    run_shortened(c for c in documented_commands(text) if c not in known)
    check_fragments(tmp_path, text, files)


def check_fragments(folder: Path, text: str, files: dict[str, str]) -> None:
    """Recipes of which a page shows a part: the part takes the place of the whole recipe's."""
    for number, fragment in enumerate(block for name, block in blocks(text) if not name):
        whole = yaml.safe_load(next(iter(files.values())))
        for key in ("space", "sampler", "pruner", "metric", "trials", "objectives"):
            whole.pop(key, None)
        whole |= {"baseline": "none", "seeds": [0]} | yaml.safe_load(fragment)
        path = folder / f"fragment-{number}.yaml"
        path.write_text(yaml.safe_dump(whole))
        run_shortened([["compare", str(path), *SMALL, "--print-config"]])


@pytest.mark.slow
def test_the_example_of_masks_and_references_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their other commands are of data sets and models that are not here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boxes.json").write_text(dict(blocks(text_of("masks")))["boxes.json"])
    found = [c for page in ("masks", "references") for c in documented_commands(text_of(page))]
    example = [c for c in found if c[0] == "init" or "data.path=clips" in c]
    ran = [" ".join(words) for words in run_shortened(example)]
    assert ran == ["init data", "data masks", "data preview", "data references", "train tiny"]
    table = [row.split(",") for row in Path("clips/masks/masks.csv").read_text().splitlines()]
    assert [row[1] for row in table[1:] if row[3] != "0"] == ["red square"]
    assert (tmp_path / "runs/tiny/result.json").is_file()


def test_the_lists_of_pages_are_complete() -> None:
    """Pages by the two tests above, and those whose examples are under tests of their own."""
    elsewhere = {
        "own-kernel",  # test_own_kernel_docs.py
        "own-metric",  # test_own_metric_docs.py
        "own-data",  # test_own_data_docs.py
        "own-loop",  # tests/alignlab/test_own_loop_docs.py
        "results",  # tests/experiments/analysis/test_results_docs.py
        "metrics",  # tests/alignlab/evaluation/test_metric_registry.py
    }
    new = {path.stem for path in DOCS.glob("own-*.md")} - {*PAGES, *WALKED, *elsewhere}
    assert not new, "run its code: add the page to a list above"
