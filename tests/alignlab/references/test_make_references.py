"""References cut out of clips: their pixels, which frames and clips, what is dropped, kills."""

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from alignlab.config.data import FolderConfig
from alignlab.data.folder import FolderDataset
from alignlab.data.images import read_image
from alignlab.data.metadata import read_rows
from alignlab.data.video import write_mp4
from alignlab.errors import UserError
from alignlab.masks.segmenter import Frame
from alignlab.references.augment import Augmentations
from alignlab.references.make import MadeReferences, make_references
from alignlab.references.pairs import ReferenceSettings
from alignlab.references.record import MadeReference
from alignlab.references.sights import Sight, cut_out, read_frames
from kills import Killed

SIDE, FRAMES, STORED = 32, 5, 8
Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""
LARGE: Box = (2, 4, 18, 20)  # a quarter of the frame
LOW: Box = (0, 22, 32, 32)  # 31 %
SMALL: Box = (24, 4, 30, 10)  # 3.5 %
CARDS = ("a red card", "a blue card", "a green card", "a gray card")


def write_clip(
    root: Path, number: int, boxes: Sequence[Box], seen: dict[int, range] | None = None
) -> dict[str, Any]:
    """A clip of noise with a box per entity, each seen in some frames; and its row."""
    pixels = np.random.default_rng(number).integers(0, 255, (STORED, SIDE, SIDE, 3))
    write_mp4(root / f"clips/{number}.mp4", torch.from_numpy(pixels.astype(np.uint8)), 8)
    (root / f"masks/{number}").mkdir(parents=True)
    for frame in range(STORED):
        labels_HW = np.zeros((SIDE, SIDE), np.uint8)
        for label, (left, top, right, bottom) in enumerate(boxes, start=1):
            if frame in (seen or {}).get(label, range(STORED)):
                labels_HW[top:bottom, left:right] = label
        labels_HW[6:8, 6:8] = 255  # undecided, in the middle of the first one
        Image.fromarray(labels_HW, "L").save(root / f"masks/{number}/{frame:05d}.png")
    return {
        "file_name": f"clips/{number}.mp4",
        "caption": "cards",
        "masks": f"masks/{number}",
        "entities": list(CARDS[: len(boxes)]),
        "note": "kept",
    }


def config_of(root: Path, rows: Sequence[dict[str, Any]]) -> FolderConfig:
    """Of the stored frames the first five are trained on."""
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FolderConfig(path=str(root), frames=FRAMES, size=(SIDE, SIDE), fps=8, val_fraction=0.5)


@pytest.fixture
def two(tmp_path: Path) -> FolderConfig:
    """A train and a val clip with a large and a small card."""
    root = tmp_path / "data"
    rows = [write_clip(root, number, [LARGE, SMALL]) for number in range(2)]
    return config_of(root, [rows[0] | {"split": "train"}, rows[1] | {"split": "val"}])


def made_of(made: MadeReferences, clip: int = 0) -> list[list[MadeReference]]:
    record = made.clips[clip].record
    assert record is not None
    return record.versions


def dropped_of(made: MadeReferences, clip: int = 0) -> dict[str, str]:
    record = made.clips[clip].record
    assert record is not None
    return {subject.phrase: subject.reason for subject in record.dropped}


def written_rows(made: MadeReferences) -> list[dict[str, Any]]:
    return [json.loads(line) for line in made.metadata.read_text().splitlines()]


def listed(config: FolderConfig) -> list[dict[str, Any]]:
    text = (Path(config.path) / config.metadata).read_text()
    return [json.loads(line) for line in text.splitlines()]


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def whole_frame(config: FolderConfig, made: MadeReference) -> np.ndarray[Any, Any]:
    rows = {row.file_name: row for row in read_rows(Path(config.path), config.metadata)}
    return read_frames(rows[made.clip], {made.frame})[made.frame][0]


def test_a_crop_is_the_frame_in_the_mask_and_white_around_it(two: FolderConfig) -> None:
    before = (Path(two.path) / "metadata.jsonl").read_bytes()
    made = make_references(two, ReferenceSettings())
    assert (Path(two.path) / "metadata.jsonl").read_bytes() == before
    ((reference,),) = made_of(made)
    assert reference.frame >= FRAMES and not reference.is_trained  # of those beside the clip
    image_HWC, mask_HW = read_image(Path(two.path) / "crops/clips/0.mp4" / reference.file)
    expected_HW = torch.ones(16, 16, dtype=torch.bool)
    expected_HW[2:4, 4:6] = False  # what is undecided is none of it
    assert mask_HW is not None and torch.equal(mask_HW, expected_HW)
    frame_HWC = torch.from_numpy(whole_frame(two, reference))[4:20, 2:18]
    assert torch.equal(image_HWC[expected_HW], frame_HWC[expected_HW])
    with Image.open(Path(two.path) / "crops/clips/0.mp4" / reference.file) as image:
        stored_HWC = np.array(image)  # programs that know no transparency see white as well
    assert (stored_HWC[~expected_HW.numpy()] == [255, 255, 255, 0]).all()
    assert reference.share == 0.25


def test_a_data_set_reads_them_and_keeps_its_other_columns(two: FolderConfig) -> None:
    made = make_references(two, ReferenceSettings())
    assert made.metadata == Path(two.path) / "metadata-crops.jsonl"
    rows = written_rows(made)
    assert rows[0]["references"] == ["crops/clips/0.mp4/0-1.png"]
    assert rows[0]["reference_phrases"] == ["a red card"]
    assert rows[0]["reference_names"] == ["clips/0.mp4:1"]
    assert [row["split"] for row in rows] == ["train", "val"]
    assert rows[0]["note"] == "kept" and rows[0]["masks"] == "masks/0"
    clips = FolderDataset(two.model_copy(update={"metadata": made.metadata.name}), "train")
    (reference,) = clips[0].references
    assert reference.phrase == "a red card" and 0 < int(reference.mask_HW.sum()) < SIDE * SIDE


def test_small_hidden_and_further_subjects_are_dropped(tmp_path: Path) -> None:
    sides: list[Box] = [(0, 0, 16, 12), (16, 0, 32, 13), (0, 12, 16, 26), (16, 13, 32, 28)]
    rows = [
        write_clip(tmp_path, 0, sides),
        write_clip(tmp_path, 1, [LARGE, SMALL, LOW], {3: range(0)}),
    ]
    made = make_references(config_of(tmp_path, rows), ReferenceSettings())
    assert dropped_of(made) == {"a red card": "smaller"}
    assert [reference.label for reference in made_of(made)[0]] == [2, 3, 4]
    assert dropped_of(made, 1) == {"a blue card": "too small", "a green card": "not seen"}
    made = make_references(
        config_of(tmp_path, rows), ReferenceSettings(name="b", most=1, min_share=0.03)
    )
    assert [reference.label for reference in made_of(made)[0]] == [4]
    assert dropped_of(made, 1) == {"a blue card": "smaller", "a green card": "not seen"}


def test_trained_frames_serve_where_no_other_one_shows_the_subject(tmp_path: Path) -> None:
    seen = {1: range(2, 4), 2: range(STORED)}
    config = config_of(tmp_path, [write_clip(tmp_path, 0, [LARGE, LOW], seen)])
    made = make_references(config, ReferenceSettings(versions=1))
    red, blue = made_of(made)[0]
    assert red.is_trained and red.frame in (2, 3)
    assert not blue.is_trained and blue.frame >= FRAMES
    made = make_references(config, ReferenceSettings(name="b", other_frames_only=True))
    assert dropped_of(made) == {"a red card": "in trained frames alone"}


def test_a_subject_that_is_mostly_hidden_in_a_frame_is_not_cut_from_it(tmp_path: Path) -> None:
    row = write_clip(tmp_path, 0, [LOW])
    for frame in range(STORED):
        path = tmp_path / f"masks/0/{frame:05d}.png"
        labels_HW = np.array(Image.open(path))
        if frame != 6:
            labels_HW[22:31, 1:31] = 0  # a frame of one pixel, whose box is as large
        Image.fromarray(labels_HW, "L").save(path)
    made = make_references(config_of(tmp_path, [row]), ReferenceSettings())
    assert made_of(made)[0][0].frame == 6


def test_versions_are_rows_with_other_frames_and_val_clips_have_one(two: FolderConfig) -> None:
    made = make_references(two, ReferenceSettings(versions=3, augment=Augmentations()))
    rows = written_rows(made)
    assert [row["split"] for row in rows] == ["train"] * 3 + ["val"]
    assert len({row["references"][0] for row in rows}) == 4
    assert {row["reference_names"][0] for row in rows[:3]} == {"clips/0.mp4:1"}
    assert {version[0].frame for version in made_of(made)} == {5, 6, 7}
    assert all(version[0].changes for version in made_of(made))
    assert not made_of(made, 1)[0][0].changes  # of a val clip
    config = two.model_copy(update={"metadata": made.metadata.name})
    clips = FolderDataset(config, "train")
    assert [clips.key(n) for n in range(3)] == [
        "clips/0.mp4",
        *(f"clips/0.mp4#{n}" for n in (2, 3)),
    ]
    videos = {str(clips.origin(n).video) for n in range(3)}
    assert len(videos) == 1  # which the dataset cache encodes once


def cross_clips(root: Path, names: Sequence[str | None], **columns: Any) -> FolderConfig:
    """Clips of one card each."""
    rows = []
    for number, name in enumerate(names):
        row = write_clip(root, number, [LARGE]) | {"split": "train"} | columns
        rows.append(row | ({} if name is None else {"entity_names": [name]}))
    return config_of(root, rows)


def test_cross_pairs_are_of_the_same_subject_in_another_clip(tmp_path: Path) -> None:
    config = cross_clips(tmp_path, ["ann", "bob", "ann", "eve", "ann"])
    made = make_references(config, ReferenceSettings(pairs="cross", versions=2))
    sources = {n: {version[0].clip for version in made_of(made, n)} for n in (0, 2, 4)}
    assert sources == {
        0: {"clips/2.mp4", "clips/4.mp4"},
        2: {"clips/0.mp4", "clips/4.mp4"},
        4: {"clips/0.mp4", "clips/2.mp4"},
    }
    assert [dropped_of(made, n) for n in (1, 3)] == [{"a red card": "no other clip"}] * 2
    rows = written_rows(made)
    assert {row["reference_names"][0] for row in rows if "references" in row} == {"ann"}
    assert sum("references" not in row for row in rows) == 2  # one row each
    (reference,) = made_of(made)[0]
    image_HWC, mask_HW = read_image(tmp_path / "crops/clips/0.mp4" / reference.file)
    frame_HWC = torch.from_numpy(whole_frame(config, reference))[4:20, 2:18]
    assert torch.equal(image_HWC[mask_HW], frame_HWC[mask_HW])


def test_cross_pairs_keep_to_their_split_and_leave_the_clips_own_frames(tmp_path: Path) -> None:
    config = cross_clips(tmp_path, ["ann", "ann"])
    rows = listed(config)
    held_out = config_of(tmp_path, [rows[0], rows[1] | {"split": "val"}])
    with pytest.raises(UserError, match=r"no subject has a reference; .*\(no other clip"):
        make_references(held_out, ReferenceSettings(pairs="cross"))
    # the same video again, from its second frame on: only what lies outside of the first clip
    later = config_of(tmp_path, [rows[0], rows[0] | {"start": 0.125}])
    made = make_references(later, ReferenceSettings(name="b", pairs="cross", versions=8))
    frames = [{version[0].frame for version in made_of(made, n)} for n in (0, 1)]
    assert frames == [{5, 6, 7}, {0, 6, 7}]
    assert config.frames == FRAMES


def test_what_says_that_subjects_are_the_same(tmp_path: Path) -> None:
    config = cross_clips(tmp_path, [None, None])
    with pytest.raises(UserError, match=r"--pairs cross: no row says .*--same-subject phrase"):
        make_references(config, ReferenceSettings(pairs="cross"))
    made = make_references(config, ReferenceSettings(pairs="cross", same_subject="phrase"))
    assert made_of(made)[0][0].clip == "clips/1.mp4"
    assert made_of(made)[0][0].name == "a red card"
    bad = [{"file_name": "clips/0.mp4", "caption": "c", "entities": ["x"], "masks": "m"}]
    config = config_of(tmp_path, [bad[0] | {"entity_names": ["a", "b"]}])
    with pytest.raises(UserError, match="2 entity_names for 1 entities"):
        make_references(config, ReferenceSettings())


def test_mixed_pairs_are_regular_where_no_other_clip_has_the_subject(tmp_path: Path) -> None:
    config = cross_clips(tmp_path, ["ann", "ann", "bob"])
    settings = ReferenceSettings(
        pairs="mixed", cross_share=0.5, versions=8, augment=Augmentations()
    )
    made = make_references(config, settings)
    pairs = [[version[0].pair for version in made_of(made, n)] for n in range(3)]
    assert set(pairs[0]) == set(pairs[1]) == {"regular", "cross"} and set(pairs[2]) == {"regular"}
    # as in RefAlign's code, cross pairs are not augmented
    assert all(bool(v[0].changes) == (v[0].pair == "regular") for v in made_of(made))


def test_draws_depend_on_the_seed_and_on_nothing_else(two: FolderConfig) -> None:
    settings = ReferenceSettings(augment=Augmentations(), versions=2)
    first = make_references(two, settings)
    rows = listed(two)
    more = write_clip(Path(two.path), 2, [LOW]) | {"split": "train"}
    config_of(Path(two.path), [more, *rows])  # comes before them
    again = make_references(two, replace(settings, name="again"))
    assert made_of(again, 1) == made_of(first, 0)
    names = ("0-1.png", "1-1.png")
    files = [[contents(made.folder / "clips/0.mp4")[n] for n in names] for made in (first, again)]
    assert files[0] == files[1]
    other = make_references(two, replace(settings, name="o", seed=1))
    assert [v[0].changes for v in made_of(other, 1)] != [v[0].changes for v in made_of(first, 0)]


def test_a_killed_command_goes_on_where_it_was(
    two: FolderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(two.path)
    whole = make_references(two, ReferenceSettings(name="whole"))
    ((last,),) = made_of(whole, 1)
    last_HWC = whole_frame(two, last)
    with monkeypatch.context() as patch:
        cut = cut_out

        def dying(frame_HWC: Frame, labels_HW: Any, sight: Sight) -> Any:
            if (frame_HWC == last_HWC).all():
                raise Killed
            return cut(frame_HWC, labels_HW, sight)

        patch.setattr("alignlab.references.make.cut_out", dying)
        with pytest.raises(Killed):
            make_references(two, ReferenceSettings())
    assert not (root / "metadata-crops.jsonl").exists()
    assert not (root / "crops/clips/1.mp4").exists()
    made = make_references(two, ReferenceSettings())
    assert [clip.is_new for clip in made.clips] == [False, True]
    pictures = [contents(m.folder / "clips") for m in (whole, made)]
    assert pictures[0] == pictures[1]
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    made = make_references(two, ReferenceSettings())
    assert not any(clip.is_new for clip in made.clips)
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_nothing_that_is_there_is_overwritten_unless_asked(two: FolderConfig) -> None:
    root = Path(two.path)
    make_references(two, ReferenceSettings())
    before = contents(root)
    with pytest.raises(UserError, match=r"0\.mp4 is there, and was made .*\(seed\): .*--replace"):
        make_references(two, ReferenceSettings(seed=1))
    labels_HW = np.array(Image.open(root / "masks/0/00006.png"))
    Image.fromarray(labels_HW * 0, "L").save(root / "masks/0/00006.png")
    with pytest.raises(UserError, match=r"0\.mp4 is there, and was made .*\(masks\)"):
        make_references(two, ReferenceSettings())
    assert contents(root) == before | {"masks/0/00006.png": contents(root)["masks/0/00006.png"]}
    made = make_references(two, ReferenceSettings(replace=True))
    assert [clip.is_new for clip in made.clips] == [True, False]
    made.metadata.write_text(made.metadata.read_text() + "\n")
    with pytest.raises(UserError, match="is not as this command wrote it"):
        make_references(two, ReferenceSettings())


def test_a_folder_of_something_else_is_left_alone(two: FolderConfig) -> None:
    mine = Path(two.path) / "references"
    mine.mkdir()
    (mine / "index.html").write_text("mine")
    with pytest.raises(UserError, match=r"--name: .*references is there, and was not made by this"):
        make_references(two, ReferenceSettings(name="references"))
    assert contents(mine) == {"index.html": b"mine"}
    make_references(two, ReferenceSettings())
    (Path(two.path) / "crops/clips/0.mp4/references.json").unlink()
    with pytest.raises(UserError, match=r"0\.mp4 is there, and was not made by this command"):
        make_references(two, ReferenceSettings(replace=True))
    with pytest.raises(UserError, match="--name: 'a/b' holds '/'"):
        make_references(two, ReferenceSettings(name="a/b"))


def test_without_masks_the_command_that_makes_them_is_named(tmp_path: Path) -> None:
    row = write_clip(tmp_path, 0, [LARGE])
    bare = {key: row[key] for key in ("file_name", "caption", "entities")}
    config = config_of(tmp_path, [bare])
    with pytest.raises(UserError, match=r"no row has masks.*`alignlab data masks RECIPE`"):
        make_references(config, ReferenceSettings())
    (tmp_path / "metadata-masks.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"read those of .* data\.metadata=metadata-masks\.jsonl"):
        make_references(config, ReferenceSettings())
    both = config_of(tmp_path, [row, bare | {"file_name": "clips/none.mp4"}])
    made = make_references(both, ReferenceSettings())
    assert made.clips[1].reason == "has no masks"
    assert "references" not in written_rows(made)[1]


def test_unusable_clips_stop_or_are_left_out(two: FolderConfig) -> None:
    Image.new("L", (8, 8)).save(Path(two.path) / "masks/0/00003.png")
    with pytest.raises(UserError, match=r"line 1: .*00003\.png: is 8x8 .*on_bad_video=skip"):
        make_references(two, ReferenceSettings())
    made = make_references(two.model_copy(update={"on_bad_video": "skip"}), ReferenceSettings())
    assert made.clips[0].reason.startswith("bad masks: ")
    assert [len(row.get("references", ())) for row in written_rows(made)] == [0, 1]


def test_pixels_that_are_not_square_are_widened_in_a_crop(tmp_path: Path) -> None:
    row = write_clip(tmp_path, 0, [LARGE]) | {"file_name": "clips/wide.mkv"}
    with av.open(str(tmp_path / "clips/wide.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(STORED):
            pixels = np.full((SIDE, SIDE, 3), 90, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    made = make_references(config_of(tmp_path, [row]), ReferenceSettings())
    image_HWC, mask_HW = read_image(made.folder / "clips/wide.mkv/0-1.png")
    assert mask_HW is not None and mask_HW.shape == (16, 32)
    expected_HW = torch.ones(16, 32, dtype=torch.bool)
    expected_HW[2:4, 8:12] = False
    assert torch.equal(mask_HW, expected_HW) and image_HWC[~mask_HW].eq(255).all()
    assert (image_HWC[4:, :].float() - 90).abs().max() < 12
