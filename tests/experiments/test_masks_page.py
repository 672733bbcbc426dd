"""`alignlab data masks`: what it prints, its page, and that a run reads what it made."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignlab.config.data import ShapesConfig
from alignlab.data.video import write_mp4
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.data_preview import striped
from alignlab.runs.metric_rows import read_rows
from alignlab.train import train
from command_line import alignlab, refused
from exported_shapes import export_shapes

SMALL = ("data.name=folder", "data.frames=5", "data.size=[32,32]", "data.fps=8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of a bright square on dark noise; the second one is cut to another picture."""
    root = tmp_path_factory.mktemp("masks") / "data"
    rng, rows = np.random.default_rng(0), []
    for number in range(2):
        video = rng.integers(0, 40, (1, 48, 64, 3)).astype(np.uint8).repeat(5, axis=0)
        for frame in range(5):
            video[frame, 12:36, 10 + 2 * frame : 34 + 2 * frame] = (220, 60, 60)
        if number:
            video[3:] = rng.integers(0, 255, (2, 48, 64, 3))
        write_mp4(root / f"clips/{number}.mp4", torch.from_numpy(video), 8)
        row = {"file_name": f"clips/{number}.mp4", "caption": "a <b>red</b> card"}
        row |= {"split": "val" if number else "train"}
        rows.append(row | {"entities": ["a <i>card</i>"], "boxes": [[10, 12, 34, 36]]})
    rows.append(rows[0] | {"file_name": "clips/1.mp4", "start": 0.0, "boxes": None})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_masks_and_their_page(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "alignlab")
    command = ("data", "masks", "tiny", *SMALL, f"data.path={root}")
    result = alignlab(*command)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == (
        "2 clips with 2 entities, 2 made now; 2 of 10 frames with undecided pixels; "
        "1 clip without masks"
    )
    assert "masks: 3/3" in caplog.text
    page = (root / "masks/index.html").read_text("utf-8")
    assert "<b>" not in page and "<i>" not in page and "a &lt;i&gt;card&lt;/i&gt;" in page
    assert "has no boxes, points or first_mask" in page
    assert page.index("<h2>clips/1.mp4</h2>") < page.index("<h2>clips/0.mp4</h2>")
    assert page.count("data:video/mp4") == 4
    with Image.open(root / "masks/sheet.png") as sheet:
        assert sheet.height > 250
    table = list(csv.reader(io.StringIO((root / "masks/masks.csv").read_text())))
    assert [row[:4] for row in table[1:3]] == [
        ["clips/1.mp4", "a <i>card</i>", "5", "2"],
        ["clips/0.mp4", "a <i>card</i>", "5", "0"],
    ]
    again = alignlab(*command)
    assert "2 clips with 2 entities, 0 made now" in again.stdout
    assert (root / "masks/index.html").read_text("utf-8") == page


def test_a_recipe_without_a_folder_and_options_that_exclude_each_other_are_refused(
    root: Path, tmp_path: Path
) -> None:
    assert "shapes is no folder of clips" in refused("data", "masks", "tiny")
    command = ("data", "masks", "tiny", *SMALL, f"data.path={root}")
    prompts = tmp_path / "p.json"
    prompts.write_text("{}")
    words = refused(*command, "--prompts", prompts, "--from-references")
    assert "--from-references and --prompts" in words
    assert "has no model" in refused(*command, "--model", "x")
    assert "--prompts: there is no file" in refused(*command, "--prompts", tmp_path / "q.json")
    assert "--name: 'a/b' holds '/'" in refused(*command, "--name", "a/b")
    (root / "file").write_text("mine")
    for place, words in ((root / "file", "is a file: choose another"), (root / "file/in", "so")):
        name = ("--name", "never", "--out")
        assert f"--out: {root / 'file'}" in (told := refused(*command, *name, place))
        assert words in told
    assert (root / "file").read_text() == "mine" and not (root / "never").exists()
    (root / "file").unlink()


def test_undecided_pixels_are_striped_and_others_are_not() -> None:
    video_THWC = torch.full((1, 16, 16, 3), 200, dtype=torch.uint8)
    undecided_THW = torch.zeros(1, 16, 16, dtype=torch.bool)
    undecided_THW[:, :, 8:] = True
    drawn_THWC = striped(video_THWC, undecided_THW)
    assert torch.equal(drawn_THWC[:, :, :8], video_THWC[:, :, :8])
    changed = (drawn_THWC[:, :, 8:] != 200).any(-1).float().mean()
    assert 0.3 < changed < 0.7


def test_clips_get_masks_then_stage_1_then_a_comparison_with_sara(
    recipe_file: Path, tmp_path: Path
) -> None:
    """The commands of docs/masks.md for Wan 2.1, on shapes that are exported to files."""
    shapes = ShapesConfig(frames=5, size=(48, 48), seed=3)
    data_set, _ = export_shapes(tmp_path / "data", shapes, 2)
    lines = recipe_file.read_text().splitlines()
    data = "data: {name: folder, path: DATA, frames: 5, size: [48, 48], val_fraction: 0.5}"
    kept = [line for line in lines if not line.startswith(("data", "objectives", "  ra:", "name"))]
    shared = "\n".join([*kept, f"output: {tmp_path}", data.replace("DATA", data_set.path), ""])
    shared = shared.replace("frames: 5,", f"frames: 5, fps: {data_set.fps}, references: [0, 0],")
    compared, first = tmp_path / "cmp.yaml", tmp_path / "first.yaml"
    aligner = tmp_path / "first" / "stage1"
    compared.write_text(
        f"name: cmp\n{shared}cost: null\nbaseline: none\nseeds: [0]\nvariants:\n  none: {{}}\n"
        "  sara: {objectives.sara: {name: sara, teacher: dino, blocks: [1], projector_dim: 8, "
        f"aligner: {aligner}}}}}\n"
    )
    stage1 = "\n".join(
        line for line in f"name: first\n{shared}".splitlines() if not line.startswith("eval")
    )
    first.write_text(
        stage1.replace("frames: 5,", "metadata: metadata-masks.jsonl, frames: 5,")
        + "\nstage1: {kind: sara, heads: 3, hidden: 8, embed_dim: 8, val_clips: 1}\n"
    )
    # nearly every entity is in doubt in some frame, so that undecided pixels are in it as well
    masks = alignlab("data", "masks", compared, "--min-confidence", "0.95")
    assert masks.exit_code == 0, masks.output
    assert "; 0 of" not in masks.stdout and "without masks" not in masks.stdout
    learnt = alignlab("stage1", "sara", first)
    assert learnt.exit_code == 0, learnt.output
    assert (aligner / "stage1.json").is_file()
    told = refused("compare", compared)
    assert "`alignlab data masks` makes masks of entities" in told
    # what the comparison trains; its report is tested elsewhere, and takes longer than all of this
    config = load_compare(compared, ["data.metadata=metadata-masks.jsonl"])
    rows = read_rows(train(config.run("sara", 0)) / "metrics.jsonl")
    assert any(row.get("loss/sara", 0.0) > 0 for row in rows)
