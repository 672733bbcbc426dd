"""Masks of a folder of clips: what is written, what is left alone, kills, and what is refused."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alignlab.config.data import FolderConfig
from alignlab.data.folder import FolderDataset
from alignlab.data.images import read_labels
from alignlab.data.metadata import read_rows
from alignlab.data.video import write_mp4
from alignlab.errors import UserError
from alignlab.masks.make import MaskSettings, make_masks
from alignlab.masks.prompts import read_prompts
from alignlab.masks.segmenter import Frame, FrameMasks, Prompt, Segmenter
from kills import Killed

SIDE, FRAMES = 32, 5


class Boxes(Segmenter):
    """Gives the boxes of the prompts in every frame; sure of an entity but where `doubts` says."""

    def __init__(
        self, doubts: dict[tuple[int, int], float] | None = None, dies_in: int = 0
    ) -> None:
        self.clips = 0
        self.doubts, self.dies_in = doubts or {}, dies_in

    @property
    def settings(self) -> dict[str, str | float | int]:
        return {"backend": "boxes"}

    def segment(self, frames: Iterable[Frame], prompts: Sequence[Prompt]) -> Iterator[FrameMasks]:
        self.clips += 1
        for number, frame_HWC in enumerate(frames):
            if self.clips == self.dies_in and number == 3:
                raise Killed
            masks_EHW = np.zeros((len(prompts), *frame_HWC.shape[:2]), np.bool_)
            for entity, prompt in enumerate(prompts):
                assert prompt.box is not None
                left, top, right, bottom = map(int, prompt.box)
                masks_EHW[entity, top:bottom, left:right] = True
            sure = [self.doubts.get((number, e), 1.0) for e in range(len(prompts))]
            yield FrameMasks(masks_EHW, np.array(sure, np.float32))


class Words(Boxes):
    """Reads phrases."""

    reads_texts = True

    def segment(self, frames: Iterable[Frame], prompts: Sequence[Prompt]) -> Iterator[FrameMasks]:
        yield from super().segment(frames, [Prompt(p.phrase, (0, 0, 4, 4)) for p in prompts])


ROW: dict[str, Any] = {
    "caption": "a red card beside a blue card",
    "entities": ["a red card", "a blue card"],
    "boxes": [[2, 2, 10, 10], [20, 4, 30, 30]],
    "note": "kept",
}


@cache
def clip(number: int) -> bytes:
    """A video of one grey."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        video_THWC = torch.full((4 * FRAMES, SIDE, SIDE, 3), 20 * number, dtype=torch.uint8)
        write_mp4(path, video_THWC, 16)
        return path.read_bytes()


def data(root: Path, rows: Sequence[dict[str, Any]]) -> FolderConfig:
    """A folder with a clip per row, of twice the frame rate that is read."""
    for number, row in enumerate(rows):
        row.setdefault("file_name", f"clips/{number}.mp4")
        path = root / row["file_name"]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(clip(number))
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FolderConfig(path=str(root), frames=FRAMES, size=(SIDE, SIDE), fps=8, val_fraction=0.5)


@pytest.fixture
def two(tmp_path: Path) -> FolderConfig:
    return data(tmp_path / "data", [dict(ROW), dict(ROW)])


def test_a_data_set_reads_the_masks_that_were_made(two: FolderConfig) -> None:
    before = (Path(two.path) / "metadata.jsonl").read_bytes()
    made = make_masks(two, Boxes(), MaskSettings())
    assert (Path(two.path) / "metadata.jsonl").read_bytes() == before
    assert made.metadata == Path(two.path) / "metadata-masks.jsonl"
    with_masks = two.model_copy(update={"metadata": made.metadata.name})
    clips = FolderDataset(with_masks, "train")
    sample = clips[0]
    assert sample.entities == ("a red card", "a blue card") and sample.masks_ETHW is not None
    expected = torch.zeros(2, FRAMES, SIDE, SIDE, dtype=torch.bool)
    expected[0, :, 2:10, 2:10] = True
    expected[1, :, 4:30, 20:30] = True
    assert torch.equal(sample.masks_ETHW, expected)
    assert json.loads(made.metadata.read_text().splitlines()[0])["note"] == "kept"


def test_frames_that_the_rate_leaves_out_are_labelled_and_later_ones_are_not(
    tmp_path: Path,
) -> None:
    config = data(
        tmp_path,
        [dict(ROW, start=0.5, split="train"), dict(ROW, split="val")],
    )
    made = make_masks(config, Boxes(), MaskSettings())
    folders = [clip.folder for clip in made.clips]
    assert folders == [tmp_path / "masks/clips/0.mp4@0.5", tmp_path / "masks/clips/1.mp4"]
    names = [sorted(path.stem for path in folder.glob("*.png")) for folder in folders if folder]
    # 16 frames a second in the file, 5 frames at 8: 9 of them, the later clip from the eighth on
    assert names == [[f"{n:05d}" for n in range(8, 17)], [f"{n:05d}" for n in range(9)]]
    FolderDataset(config.model_copy(update={"metadata": made.metadata.name}), "train")


def test_an_entity_in_doubt_leaves_undecided_all_that_no_other_one_has(two: FolderConfig) -> None:
    made = make_masks(two, Boxes({(3, 0): 0.4}), MaskSettings(min_confidence=0.5))
    folder, record = made.clips[0].folder, made.clips[0].record
    assert folder is not None and record is not None
    sure, doubtful = (read_labels(folder / f"{n:05d}.png") for n in (2, 3))
    assert set(sure.flatten().tolist()) == {0, 1, 2}
    assert set(doubtful.flatten().tolist()) == {2, 255}
    assert int((doubtful == 2).sum()) == 26 * 10
    assert (record.undecided, record.doubtful(0), record.doubtful(1)) == (1, 1, 0)
    assert Image.open(folder / "00003.png").getpixel((0, 0)) == 255


def test_a_box_that_is_null_is_in_doubt_everywhere(tmp_path: Path) -> None:
    config = data(tmp_path, [dict(ROW, boxes=[None, [20, 4, 30, 30]]), dict(ROW)])
    record = make_masks(config, Boxes(), MaskSettings()).clips[0].record
    assert record is not None and record.doubtful(0) == record.frames == 9
    assert record.doubtful(1) == 0 and record.undecided == 9


def test_a_killed_command_goes_on_with_the_clip_that_it_was_at(two: FolderConfig) -> None:
    whole = Path(two.path).with_name("whole")
    other = data(whole, [dict(ROW), dict(ROW)])
    make_masks(other, Boxes(), MaskSettings())
    with pytest.raises(Killed):
        make_masks(two, Boxes(dies_in=2), MaskSettings())
    assert not (Path(two.path) / "metadata-masks.jsonl").exists()
    again = Boxes()
    made = make_masks(two, again, MaskSettings())
    assert again.clips == 1 and [clip.is_new for clip in made.clips] == [False, True]
    assert contents(Path(two.path)) == contents(whole)
    third = Boxes()
    make_masks(two, third, MaskSettings())
    assert third.clips == 0 and contents(Path(two.path)) == contents(whole)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_masks_of_other_settings_are_not_overwritten_unless_asked(two: FolderConfig) -> None:
    make_masks(two, Boxes(), MaskSettings())
    before = contents(Path(two.path))
    with pytest.raises(UserError, match=r"0\.mp4 is there, and was made .*\(min_confidence\)"):
        make_masks(two, Boxes(), MaskSettings(min_confidence=0.1))
    assert contents(Path(two.path)) == before
    replaced = Boxes()
    make_masks(two, replaced, MaskSettings(min_confidence=0.1, replace=True))
    assert replaced.clips == 2
    beside = make_masks(two, Boxes(), MaskSettings(name="others"))
    assert beside.metadata.name == "metadata-others.jsonl"


def test_a_clip_whose_video_changed_is_not_taken_for_done(two: FolderConfig) -> None:
    make_masks(two, Boxes(), MaskSettings())
    video = Path(two.path) / "clips/1.mp4"
    write_mp4(video, torch.full((20, SIDE, SIDE, 3), 200, dtype=torch.uint8), 16)
    with pytest.raises(UserError, match=r"1\.mp4 is there, and was made .*\(video\)"):
        make_masks(two, Boxes(), MaskSettings())


def test_foreign_files_in_the_way_are_left_alone(two: FolderConfig) -> None:
    foreign = Path(two.path) / "masks/clips/0.mp4"
    foreign.mkdir(parents=True)
    (foreign / "00000.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="was not made by this command"):
        make_masks(two, Boxes(), MaskSettings())
    assert (foreign / "00000.png").read_bytes() == b"mine"
    make_masks(two, Boxes(), MaskSettings(name="m"))
    written = Path(two.path) / "metadata-m.jsonl"
    written.write_text(written.read_text() + "\n")
    with pytest.raises(UserError, match="is not as this command wrote it"):
        make_masks(two, Boxes(), MaskSettings(name="m"))


def test_rows_with_masks_of_their_own_keep_them(tmp_path: Path) -> None:
    own = dict(ROW, masks="own", entities=["a card"], boxes=[[2, 2, 10, 10]])
    config = data(tmp_path, [own, dict(ROW)])
    (tmp_path / "own").mkdir()
    segmenter = Boxes()
    made = make_masks(config, segmenter, MaskSettings())
    rows = [json.loads(line) for line in made.metadata.read_text().splitlines()]
    assert segmenter.clips == 1 and list((tmp_path / "own").iterdir()) == []
    assert (rows[0]["masks"], rows[0]["entities"]) == ("own", ["a card"])
    made = make_masks(config, segmenter, MaskSettings(replace=True))
    assert json.loads(made.metadata.read_text().splitlines()[0])["masks"] == "masks/clips/0.mp4"
    assert list((tmp_path / "own").iterdir()) == []


def test_clips_that_nothing_is_asked_of_are_told_and_lose_their_entities(tmp_path: Path) -> None:
    bare = {"caption": "a card", "entities": ["a card"]}
    config = data(tmp_path, [dict(ROW), dict(bare)])
    made = make_masks(config, Boxes(), MaskSettings())
    assert made.clips[1].reason == "has no boxes, points or first_mask"
    row = json.loads(made.metadata.read_text().splitlines()[1])
    assert "entities" not in row and "masks" not in row
    read_rows(tmp_path, made.metadata.name)
    nowhere = data(tmp_path / "c", [dict(bare, boxes=[None])])
    with pytest.raises(UserError, match="says of none of its entities where it is"):
        make_masks(nowhere, Boxes(), MaskSettings())
    lonely = data(tmp_path / "b", [dict(bare)])
    with pytest.raises(UserError, match=r"no clip has masks now; .*no boxes"):
        make_masks(lonely, Boxes(), MaskSettings())


def test_unusable_clips_stop_the_command_or_are_left_out(two: FolderConfig) -> None:
    (Path(two.path) / "clips/0.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"line 1: .*0\.mp4: cannot be read.*on_bad_video=skip"):
        make_masks(two, Boxes(), MaskSettings())
    made = make_masks(two.model_copy(update={"on_bad_video": "skip"}), Boxes(), MaskSettings())
    assert [clip.folder is None for clip in made.clips] == [True, False]
    assert made.clips[0].reason.startswith("unreadable: ")
    assert "masks" not in json.loads(made.metadata.read_text().splitlines()[0])


def test_a_box_beside_the_frame_is_named(tmp_path: Path) -> None:
    config = data(tmp_path, [dict(ROW, boxes=[[40, 2, 50, 9], [0, 0, 9, 9]])])
    with pytest.raises(UserError, match=r"line 1: the box .* of 'a red card' is beside its 32x32"):
        make_masks(config, Boxes(), MaskSettings())


def test_a_segmenter_of_texts_takes_entities_or_the_captions_phrases(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"caption": "a red card on a table"},
        {"caption": "x", "entities": ["a dog", "a dog"]},
    ]
    made = make_masks(data(tmp_path, rows), Words(), MaskSettings())
    entities = [clip.record.entities for clip in made.clips if clip.record]
    assert entities == [["red card", "table"], ["a dog"]]


def test_a_file_of_prompts_takes_the_place_of_the_rows(two: FolderConfig, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"clips/1.mp4": {"entities": ["a dog"], "boxes": [[0, 0, 5, 5]]}}))
    made = make_masks(two, Boxes(), MaskSettings(prompts=read_prompts(path)))
    records = [clip.record for clip in made.clips]
    assert [r.entities for r in records if r] == [["a red card", "a blue card"], ["a dog"]]
    path.write_text(json.dumps({"clips/2.mp4": {"entities": ["a dog"], "boxes": [[0, 0, 5, 5]]}}))
    with pytest.raises(UserError, match=r"unknown clip 'clips/2.mp4', did you mean"):
        make_masks(two, Boxes(), MaskSettings(name="b", prompts=read_prompts(path)))


def test_names_of_entities_stay_with_the_entities_that_have_them(tmp_path: Path) -> None:
    named = dict(ROW, entity_names=["ann's card", "bob's card"])
    config = data(tmp_path, [dict(named), dict(named)])
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"clips/1.mp4": {"entities": ["a dog"], "boxes": [None]}}))
    path = make_masks(config, Words(), MaskSettings(prompts=read_prompts(prompts))).metadata
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["entity_names"] == ["ann's card", "bob's card"]
    assert rows[1]["entities"] == ["a dog"] and "entity_names" not in rows[1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"boxes": [[1, 2, 3, 4]]}, "1 boxes for 2 entities"),
        ({"boxes": [[9, 2, 3, 4], None]}, r"boxes: \[9, 2, 3, 4\] is empty"),
        ({"boxes": [[1, 2, 3], None]}, r"must be \[left, top, right, bottom\]"),
        ({"points": [[[1, 2, 0]], None]}, "no point that is on the entity"),
        ({"points": [[[1, 2, 5]], None]}, "must end in 1"),
        ({"first_mask": "a.png"}, "has first_mask and boxes or points"),
        ({"boxes": "[[1,"}, "boxes is not valid JSON"),
        ({"boxes": None, "first_mask": "../a.png"}, "must be a path inside the folder"),
        ({"boxes": None, "first_mask": 3}, "first_mask must be the path of a label image"),
        ({"boxes": None, "first_mask": "a.png", "entities": []}, "first_mask, and no entities"),
        ({"boxes": {"a red card": [1, 2, 3, 4]}}, "boxes must be a list, with an item per entity"),
        ({"points": [5, None]}, r"points: 5 must be a list of \[x, y\]"),
        ({"points": [[[1]], None]}, r"points: \[1\] must be \[x, y\], or \[x, y, 0\]"),
        (
            {"entities": [f"card {n}" for n in range(255)], "boxes": None, "first_mask": "a.png"},
            "254",
        ),
    ],
)
def test_columns_that_say_where_entities_are_are_checked(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    config = data(tmp_path, [dict(ROW) | columns])
    with pytest.raises(UserError, match=message):
        make_masks(config, Boxes(), MaskSettings())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"boxes": None, "points": [[[40, 2]], None]},
            r"the point \[40, 2\] of 'a red card' is bes",
        ),
        ({"boxes": None, "first_mask": "small.png"}, r"small\.png: is 8x8 .*, the video 32x32"),
        ({"boxes": None, "first_mask": "three.png"}, r"has the label 3, and the row names 2 enti"),
    ],
)
def test_places_are_held_against_the_first_frame(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    config = data(tmp_path, [dict(ROW) | columns, dict(ROW)])
    Image.new("L", (8, 8), 1).save(tmp_path / "small.png")
    Image.new("L", (SIDE, SIDE), 3).save(tmp_path / "three.png")
    with pytest.raises(UserError, match=f"line 1: .*{message}"):
        make_masks(config, Boxes(), MaskSettings())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "has no references"),
        ({"references": ["grey.png"]}, "needs reference_phrases, what the caption calls each"),
        (
            {"references": ["noise.png"], "reference_phrases": ["a cat"]},
            "has no reference that is found in its first frame",
        ),
    ],
)
def test_references_that_cannot_be_looked_for_are_told(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    config = data(tmp_path, [{"caption": "a cat"} | columns])
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.new("RGB", (16, 16), "grey").save(tmp_path / "grey.png")
    with pytest.raises(UserError, match=message):
        make_masks(config, Boxes(), MaskSettings(from_references=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "must hold an object of objects, one per clip"),
        ('{"a.mp4": {}}', "a.mp4: entities is missing or empty"),
        ('{"a.mp4": {"entities": [" "]}}', "a.mp4: entities must be a list of texts"),
        ('{"a.mp4": {"entities": ["a"], "first_mask": "x"}}', "is a column of the metadata"),
    ],
)
def test_bad_files_of_prompts_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "prompts.json")


def test_what_is_in_the_way_of_all_masks_is_told(two: FolderConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path: there is no folder .*nowhere"):
        make_masks(
            two.model_copy(update={"path": str(tmp_path / "nowhere")}), Boxes(), MaskSettings()
        )
    (Path(two.path) / "taken").write_text("mine")
    with pytest.raises(UserError, match=r"--name: .*taken is a file: choose another name"):
        make_masks(two, Boxes(), MaskSettings(name="taken"))
    with pytest.raises(UserError, match=r"no clip has masks now; .* its caption names none"):
        plain = data(tmp_path / "plain", [{"caption": "running"}])
        make_masks(plain, Words(), MaskSettings())


def test_entities_without_masks_are_for_this_command_alone(two: FolderConfig) -> None:
    with pytest.raises(UserError, match=r"masks and entities go together.*alignlab data masks"):
        FolderDataset(two, "train")


def test_csv_holds_boxes_as_json(tmp_path: Path) -> None:
    config = data(tmp_path, [dict(ROW)]).model_copy(update={"metadata": "m.csv"})
    (tmp_path / "m.csv").write_text(
        'file_name,caption,entities,boxes\nclips/0.mp4,cards,a red card,"[[2, 2, 10, 10]]"\n'
    )
    made = make_masks(config, Boxes(), MaskSettings())
    assert made.metadata.name == "m-masks.jsonl"
    assert [row.entities for row in read_rows(tmp_path, "m-masks.jsonl")] == [("a red card",)]
