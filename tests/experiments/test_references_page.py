"""`alignlab data references`: what it prints, its page, and a RefAlign training on what it made."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignlab.config.data import FolderConfig, ShapesConfig
from alignlab.data.folder import FolderDataset
from alignlab.data.images import read_image, read_labels
from alignlab.data.video import decode_clip
from alignlab.experiments.references_page import dimmed_around
from alignlab.train import train
from command_line import alignlab, refused
from exported_shapes import export_masked_shapes
from tiny_runs import MakeConfig

STORED, FRAMES = 9, 5
CLIPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of nine frames, of which five are trained on, with their true masks."""
    root = tmp_path_factory.mktemp("references") / "data"
    export_masked_shapes(root, ShapesConfig(frames=STORED, size=(48, 48)), CLIPS)
    return root


def small(root: Path) -> tuple[str, ...]:
    settings = ("data.name=folder", f"data.frames={FRAMES}", "data.size=[48,48]", "data.fps=8")
    return (*settings, f"data.path={root}", "data.val_fraction=0.34")


def test_references_of_true_masks_and_their_page(
    root: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "alignlab")
    command = ("data", "references", "tiny", *small(root), "--min-share", "0.03")
    result = alignlab(*command, "--other-frames-only")
    assert result.exit_code == 0, result.output
    assert f"references: {CLIPS}/{CLIPS}" in caplog.text
    table = list(csv.DictReader(io.StringIO((root / "crops/references.csv").read_text())))
    kept = [row for row in table if row["file"]]
    assert len(kept) >= 2 * CLIPS
    assert result.stdout.startswith(f"{len(kept)} references ({len(kept)} regular, 0 cross) of ")
    for row in kept:
        check_pixels(root, row)
    page = (root / "crops/index.html").read_text("utf-8")
    assert page.count('alt="reference"') == len(kept) and page.count("data:image/jpeg") == len(kept)
    with Image.open(root / "crops/sheet.png") as sheet:
        assert sheet.height >= CLIPS * 128
    assert "made now" in result.stdout
    again = alignlab(*command, "--other-frames-only")
    assert "of which 0 made now" in again.stdout

    config = make_config(
        *small(root), "data.metadata=metadata-crops.jsonl", "data.references=[1,3]"
    )
    assert isinstance(config.data, FolderConfig)
    clips = FolderDataset(config.data, "train")
    references = [reference for n in range(len(clips)) for reference in clips.references(n)]
    assert references and all(r.image_HWC[~r.mask_HW].eq(255).all() for r in references)
    log = (train(config) / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    losses = [row["loss/ra"] for row in rows if "loss/ra" in row]
    assert losses[0] > 0  # at the second step all references are dropped, as 20 % of them are


def check_pixels(root: Path, row: dict[str, str]) -> None:
    """A crop equals its frame in the true mask, is white elsewhere, and no frame is trained on."""
    image_HWC, mask_HW = read_image(root / "crops" / row["clip"] / row["file"])
    frame = int(row["frame"])
    assert frame >= FRAMES and row["trained"] == "0" and row["from"] == row["clip"]
    number = Path(row["clip"]).stem
    label = int(row["file"].removesuffix(".png").split("-")[1])
    truth_HW = read_labels(root / f"masks/{number}/{frame:05d}.png") == label
    places = truth_HW.nonzero()
    (top, left), (bottom, right) = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
    expected_HW = truth_HW[top:bottom, left:right]
    assert mask_HW is not None and torch.equal(mask_HW, expected_HW)
    video_THWC = decode_clip(root / row["clip"], frames=STORED, fps=8, size_HW=(48, 48)).video_THWC
    expected_HWC = video_THWC[frame, top:bottom, left:right]
    assert torch.equal(image_HWC[expected_HW], expected_HWC[expected_HW])
    assert image_HWC[~expected_HW].eq(255).all()
    assert float(row["share"]) == pytest.approx(expected_HW.numel() / 48**2, abs=1e-4)


def test_pages_escape_what_users_wrote_and_tell_what_is_dropped(root: Path, tmp_path: Path) -> None:
    lines = (root / "metadata.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"caption": "a <b>red</b> card", "split": "train"}
    first["entities"] = ["=<i>x</i>", *first["entities"][1:]]
    bare = {"file_name": "clips/1.mp4", "caption": "c", "split": "val"}
    (root / "m.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(bare) + "\n")
    command = ("data", "references", "tiny", *small(root), "data.metadata=m.jsonl")
    out = tmp_path / "page"
    result = alignlab(*command, "--name", "few", "--most", "1", "--min-share", "0", "--out", out)
    assert result.exit_code == 0, result.output
    others = len(first["entities"]) - 1
    assert f"dropped: {others} smaller" in result.stdout
    assert "1 clip without masks, or left out" in result.stdout
    page = (out / "index.html").read_text("utf-8")
    assert "<b>" not in page and "<i>" not in page and "has no masks" in page
    assert "a &lt;b&gt;red&lt;/b&gt; card" in page
    assert not (root / "few/index.html").exists()
    table = csv.DictReader(io.StringIO((out / "references.csv").read_text()))
    names = [row["subject"] for row in table]
    assert "'=<i>x</i>" in names


def test_what_cannot_be_meant_is_refused(root: Path) -> None:
    assert "shapes is no folder of clips" in refused("data", "references", "tiny")
    command = ("data", "references", "tiny", *small(root))
    assert "nothing reads it with --pairs regular" in refused(*command, "--cross-share", "0.5")
    assert "unknown augmentation 'auto'" in refused(*command, "--augment", "auto")
    assert "--name: 'a/b' holds '/'" in refused(*command, "--name", "a/b")
    assert "no subject has a reference" in refused(*command, "--name", "n", "--min-share", "1")
    assert "crops/index.html is a file" in refused(
        *command, "--out", root / "crops/index.html"
    ).replace(f"{root}/", "")


def test_all_but_the_subject_is_dimmed() -> None:
    frame_HWC = torch.full((4, 4, 3), 200, dtype=torch.uint8)
    mask_HW = torch.zeros(4, 4, dtype=torch.bool)
    mask_HW[1:3, 1:3] = True
    dimmed_HWC = dimmed_around(frame_HWC, mask_HW)
    assert (dimmed_HWC[mask_HW] == 200).all() and (dimmed_HWC[~mask_HW] == 60).all()
