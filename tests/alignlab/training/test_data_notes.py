"""What is wrong in the data of a run is told before it trains, and kept with its result."""

import json
import logging
from pathlib import Path

import pytest
import torch

from alignlab.config.data import FolderConfig
from alignlab.config.run import RunConfig
from alignlab.data.video import write_mp4
from alignlab.train import train
from tiny_runs import MakeConfig


def on_folder(config: RunConfig, root: Path) -> RunConfig:
    data = FolderConfig(
        path=str(root), frames=5, size=(48, 48), fps=8, val_fraction=0.2, on_bad_video="skip"
    )
    return config.model_copy(update={"data": data, "name": config.name})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight clips; the data of one are damaged behind its header, one caption is far too long."""
    root, rows = tmp_path / "clips", []
    generator = torch.Generator().manual_seed(0)
    for number in range(8):
        path = root / f"{number}.mp4"
        video = torch.randint(0, 256, (9, 48, 48, 3), dtype=torch.uint8, generator=generator)
        write_mp4(path, video, fps=8)
        caption = "a cat " * (40 if number == 5 else 1)
        rows.append({"file_name": path.name, "caption": caption})
    contents = bytearray((root / "3.mp4").read_bytes())
    contents[len(contents) // 10 : len(contents) // 2] = bytes(len(contents) * 4 // 10)
    (root / "3.mp4").write_bytes(contents)
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_a_damaged_clip_and_cut_captions(
    root: Path,
    make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = on_folder(make_config("name=first", "steps=4", aligned=False), root)
    with caplog.at_level(logging.WARNING):
        result = json.loads((train(first) / "result.json").read_text())
        # a second run of the same command on the same data decodes nothing, and repeats nothing
        monkeypatch.setattr("alignlab.data.folder.check_clip", None)
        second = on_folder(make_config("name=second", "steps=2", aligned=False), root)
        again = json.loads((train(second) / "result.json").read_text())
    skipped, cut = result["notes"]
    assert "1 of " in skipped and "skipped" in skipped and "3.mp4" in skipped
    assert cut.startswith("captions are cut at 32 tokens") and cut.endswith("[1 of 7]")
    assert again["notes"] == result["notes"]
    said = [record.getMessage() for record in caplog.records]
    assert [said.count(note) for note in result["notes"]] == [1, 1]
