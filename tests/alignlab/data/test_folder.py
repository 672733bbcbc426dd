"""A folder of real clips: metadata, references, masks, split, and what is refused."""

import json
import logging
import pkgutil
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import av
import numpy as np
import pytest
import torch
from PIL import Image

from alignlab.config.data import ClipsConfig, FolderConfig
from alignlab.data.folder import FolderDataset
from alignlab.data.metadata import misnamed_columns, read_rows
from alignlab.data.registry import DATASETS, build_dataset
from alignlab.data.sample import Sample
from alignlab.data.video import write_mp4
from alignlab.errors import UserError

Rows = list[dict[str, Any]]
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@pytest.fixture(scope="module")
def gray_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames at 12 fps; frame i is gray 20 + 5 i."""
    levels = 20 + 5 * torch.arange(24, dtype=torch.uint8)
    path = tmp_path_factory.mktemp("gray") / "clip.mp4"
    write_mp4(path, levels[:, None, None, None].expand(24, 32, 48, 3), 12)
    return path


@pytest.fixture
def root(gray_clip: Path, tmp_path: Path) -> Path:
    """Four times that clip, two references."""
    (tmp_path / "clips").mkdir()
    for name in "abcd":
        shutil.copy(gray_clip, tmp_path / "clips" / f"{name}.mp4")
    (tmp_path / "refs").mkdir()
    Image.new("RGB", (40, 20), (200, 30, 30)).save(tmp_path / "refs" / "red.png")
    Image.new("RGB", (20, 40), (30, 30, 200)).save(tmp_path / "refs" / "blue.png")
    write_jsonl(tmp_path, rows())
    return tmp_path


def rows() -> Rows:
    return [
        {
            "file_name": f"clips/{name}.mp4",
            "caption": f"Clip {name}, in gray",
            "references": ["refs/red.png", "refs/blue.png"],
            "reference_names": ["red one", "blue one"],
            "reference_phrases": ["a red card", ""],
        }
        for name in "abcd"
    ]


def write_jsonl(root: Path, lines: Rows) -> None:
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")


def write_masks(root: Path, frames: Iterable[int], label: int = 1) -> None:
    """Label images of the clips' frames, which are all one entity."""
    (root / "masks").mkdir(exist_ok=True)
    for index in frames:
        Image.new("L", (48, 32), label).save(root / "masks" / f"{index:05d}.png")


def config(root: Path, **changes: Any) -> FolderConfig:
    settings = {"frames": 5, "size": (32, 32), "fps": 6, "val_fraction": 0.2, **changes}
    return FolderConfig(path=str(root), **settings)


def all_of(settings: FolderConfig, split: Split) -> list[Sample]:
    dataset = FolderDataset(settings, split)
    return [dataset[index] for index in range(len(dataset))]


def both_splits(root: Path, **changes: Any) -> dict[str, Sample]:
    settings = config(root, **changes)
    return {sample.key: sample for sample in all_of(settings, "train") + all_of(settings, "val")}


def test_sample_holds_the_row(root: Path) -> None:
    samples = both_splits(root)
    assert set(samples) == {f"clips/{name}.mp4" for name in "abcd"}
    sample = samples["clips/b.mp4"]
    assert sample.caption == "Clip b, in gray"
    levels = sample.video_THWC.float().mean(dim=(1, 2, 3))
    assert ((levels - 20) / 5).round().tolist() == [0, 2, 4, 6, 8]
    red, blue = sample.references
    assert (red.name, red.phrase, blue.name, blue.phrase) == (
        "red one",
        "a red card",
        "blue one",
        "",
    )
    assert red.image_HWC.shape == (32, 32, 3) and red.image_HWC[16, 16].tolist() == [200, 30, 30]
    assert red.mask_HW.sum() == 32 * 16 and (red.image_HWC[~red.mask_HW] == 255).all()
    assert sample.masks_ETHW is None and sample.flow_THWC is None


def test_same_index_gives_the_same_bits(root: Path) -> None:
    first, second = (FolderDataset(config(root), "train") for _ in range(2))
    assert len(first) == len(second) > 0
    assert torch.equal(first[1].video_THWC, second[1].video_THWC)
    with pytest.raises(IndexError):
        first[len(first)]


def test_csv_and_json_say_the_same_as_jsonl(root: Path) -> None:
    header = "file_name,text,start,references,reference_names,reference_phrases\n"
    subjects = "refs/red.png|refs/blue.png,red one|blue one,a red card|"
    lines = [f'clips/{name}.mp4,"Clip {name}, in gray",,{subjects}' for name in "abcd"]
    (root / "metadata.csv").write_text("\ufeff" + header + "\n".join(lines), "utf-8")
    (root / "metadata.json").write_text(json.dumps(rows()))
    expected = both_splits(root)
    for metadata in ("metadata.csv", "metadata.json"):
        found = both_splits(root, metadata=metadata)
        assert found.keys() == expected.keys()
        for key, sample in found.items():
            assert sample.caption == expected[key].caption
            assert torch.equal(sample.video_THWC, expected[key].video_THWC)
            labels = [(ref.name, ref.phrase) for ref in sample.references]
            assert labels == [(ref.name, ref.phrase) for ref in expected[key].references]


def test_start_and_repeated_clips_have_their_own_keys(root: Path) -> None:
    row = rows()[0]
    write_jsonl(root, [row, {**row, "start": 0.5}, {**row, "caption": "again"}, *rows()[1:]])
    samples = both_splits(root)
    assert {"clips/a.mp4", "clips/a.mp4@0.5", "clips/a.mp4#2"} < set(samples)
    level = samples["clips/a.mp4@0.5"].video_THWC[0].float().mean()
    assert round(float(level - 20) / 5) == 6


def test_references_are_limited_and_default_to_their_path(root: Path) -> None:
    write_jsonl(root, [{**row, "reference_names": None} for row in rows()])
    sample = FolderDataset(config(root, references=(0, 1)), "train")[0]
    assert [reference.name for reference in sample.references] == ["refs/red.png"]


def test_of_more_references_than_allowed_the_largest_crops_are_taken(root: Path) -> None:
    """An alpha channel says where the crop is: a small subject on a large canvas is small."""
    for name, canvas, box in [
        ("tall", (40, 60), (0, 0, 10, 60)),  # 600
        ("dot", (200, 200), (90, 90, 94, 94)),  # 16
        ("ring", (50, 50), (5, 5, 45, 45)),  # 1600, most of it transparent
        ("twin", (60, 10), (0, 0, 60, 10)),  # 600
        ("void", (80, 80), (0, 0, 0, 0)),  # 0
    ]:
        pixels = np.zeros((canvas[1], canvas[0], 4), np.uint8)
        left, top, right, bottom = box
        pixels[top:bottom, left:right] = 255
        if name == "ring":
            pixels[10:40, 10:40] = 0
        Image.fromarray(pixels).save(root / f"refs/{name}.png")
    Image.new("RGB", (30, 21), "red").save(root / "refs/whole.png")  # 630
    files = [f"refs/{n}.png" for n in ("void", "tall", "dot", "twin", "whole", "ring")]
    label = {"reference_names": None, "reference_phrases": None}
    write_jsonl(root, [{**row, **label, "references": files} for row in rows()])
    for most, expected in (
        (1, ["ring"]),
        (3, ["ring", "whole", "tall"]),
        (5, ["ring", "whole", "tall", "twin", "dot"]),
        (6, ["void", "tall", "dot", "twin", "whole", "ring"]),  # none too many: as listed
    ):
        sample = FolderDataset(config(root, references=(0, most)), "train")[0]
        assert [ref.name for ref in sample.references] == [f"refs/{n}.png" for n in expected]


def test_it_names_the_first_clip_without_masks(root: Path) -> None:
    write_masks(root, range(24))
    masked = {"masks": "masks", "entities": ["block"]}
    held_out = {row.key for row in all_of(config(root), "val")}
    lines = [{**row, **masked} for row in rows()]
    write_jsonl(root, lines)
    assert FolderDataset(config(root), "train").without_masks() is None
    trained = [i for i, row in enumerate(rows()) if row["file_name"] not in held_out]
    lines[trained[1]] = rows()[trained[1]]
    write_jsonl(root, lines)
    found = FolderDataset(config(root), "train").without_masks()
    assert found == rows()[trained[1]]["file_name"]
    assert FolderDataset(config(root), "val").without_masks() is None


def test_masks_follow_the_frames_of_the_clip(root: Path) -> None:
    """Entity 2 is a block that moves right by one pixel per source frame; 255 is undecided.

    The clip begins behind the video's second keyframe (x264 sets one at frame 250).
    """
    write_mp4(root / "clips" / "a.mp4", torch.zeros(280, 32, 48, 3, dtype=torch.uint8), 12)
    (root / "masks").mkdir()
    for index in range(264, 274):
        labels = Image.new("P", (48, 32), 0)
        labels.putpalette([level for level in range(256) for _ in range(3)])
        labels.paste(1, (0, 0, 48, 8))
        labels.paste(2, (index - 250, 16, index - 242, 24))
        labels.paste(255, (0, 30, 48, 32))
        labels.save(root / "masks" / f"{index:05d}.png")
    masked = {**rows()[0], "start": 22, "masks": "masks", "entities": ["sky", "block"]}
    write_jsonl(root, [masked, *rows()[1:]])
    samples = both_splits(root)
    assert samples["clips/b.mp4"].masks_ETHW is None
    masks_ETHW = samples["clips/a.mp4@22"].masks_ETHW
    assert samples["clips/a.mp4@22"].entities == ("sky", "block")
    assert masks_ETHW is not None and masks_ETHW.shape == (2, 5, 32, 32)
    assert masks_ETHW[0, :, :8].all() and not masks_ETHW[0, :, 8:].any()
    for step in range(5):
        left = 14 + 2 * step - 8  # the crop takes 8 columns off
        columns = masks_ETHW[1, step, 20].nonzero().flatten().tolist()
        assert columns == list(range(left, left + 8))
    undecided_THW = samples["clips/a.mp4@22"].undecided_THW
    assert undecided_THW is not None and undecided_THW.shape == (5, 32, 32)
    assert undecided_THW[:, 30:].all() and not undecided_THW[:, :30].any()

    (root / "masks" / "00270.png").unlink()
    with pytest.raises(UserError, match=r"00270\.png"):
        both_splits(root)


def test_bad_clips_are_fatal_or_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "clips" / "a.mp4").write_bytes(b"nothing" * 1000)
    write_mp4(root / "clips" / "b.mp4", torch.zeros(6, 32, 32, 3, dtype=torch.uint8), 12)
    Image.new("RGB", (8, 8)).save(root / "refs" / "one.png")
    lines = rows()
    lines[2] = {"file_name": "clips/c.mp4", "caption": "c"}
    copies = [{**lines[3], "caption": f"copy {i}"} for i in range(3)]
    write_jsonl(root, [*lines, *copies])
    settings = config(root, references=(1, 3), val_fraction=1e-9)
    kept: list[Sample] = []
    reasons: list[str] = []
    for split in SPLITS:
        skipping = settings.model_copy(update={"on_bad_video": "skip"})
        caplog.clear()
        try:
            with caplog.at_level(logging.WARNING):
                kept += all_of(skipping, split)
        except UserError as error:
            assert "no clip left" in str(error)
        reasons += [record.getMessage() for record in caplog.records]
    assert [sample.caption for sample in kept] == ["Clip d, in gray", "copy 0", "copy 1", "copy 2"]
    assert len(reasons) <= 2
    said = " ".join(reasons)
    for kind in ("1 unreadable", "1 too short", "1 short of references", "first: "):
        assert kind in said

    with pytest.raises(UserError, match=r"(a\.mp4|b\.mp4|line 3).*on_bad_video=skip"):
        both_splits(root, references=(1, 3), val_fraction=1e-9)


def damage(path: Path) -> None:
    """Overwrites bytes behind the first half second; the index stays whole."""
    contents = bytearray(path.read_bytes())
    begin, end = len(contents) * 7 // 20, len(contents) * 9 // 10
    contents[begin:end] = bytes(end - begin)
    path.write_bytes(contents)


def noise(num_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (num_frames, 32, 48, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def trained(root: Path) -> str:
    """The letter of a clip that is in the train split."""
    return Path(all_of(config(root), "train")[0].key).stem


def spoil_video(root: Path) -> None:
    path = root / "clips" / f"{trained(root)}.mp4"
    write_mp4(path, noise(24), 12)
    damage(path)


def spoil_reference(root: Path) -> None:
    own = root / "refs" / "own.png"
    Image.fromarray(noise(1)[0].numpy()).save(own)
    own.write_bytes(own.read_bytes()[:-30])


def deep_reference(root: Path) -> None:
    Image.new("I;16", (8, 8), 40_000).save(root / "refs" / "own.png")


def with_mask(image: Image.Image, frame: int = 4) -> Callable[[Path], None]:
    """Labels for all frames, one of which is this image."""

    def spoil(root: Path) -> None:
        write_masks(root, range(24))
        image.save(root / "masks" / f"{frame:05d}.png")

    return spoil


def cut_mask(root: Path) -> None:
    write_masks(root, range(24))
    path = root / "masks" / "00004.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "video": (spoil_video, r"clips/.\.mp4: (is damaged|cannot be read)"),
    "cut image": (spoil_reference, r"refs/own\.png: cannot be read"),
    "16-bit image": (deep_reference, r"refs/own\.png: has more than 8 bits"),
    "no masks": (lambda root: None, "there is no masks folder .*masks"),
    "masks one short": (
        lambda root: write_masks(root, range(8)),
        r"masks/00008\.png: is missing, the labels of frame 8",
    ),
    "masks from 1": (
        lambda root: write_masks(root, range(1, 25)),
        r"masks: has 00001\.png but no 00000\.png, and frames are counted from 0",
    ),
    "mask of another size": (
        with_mask(Image.new("L", (32, 48))),
        r"00004\.png: is 48x32 \(height x width\), the video 32x48",
    ),
    "mask in colour": (with_mask(Image.new("RGB", (48, 32))), r"00004\.png: .*not RGB"),
    "mask of 16 bits": (with_mask(Image.new("I;16", (48, 32))), r"00004\.png: .*not I;16"),
    "mask of 1 bit": (with_mask(Image.new("1", (48, 32))), r"00004\.png: .*not 1"),
    "cut mask": (
        cut_mask,
        r"00004\.png: cannot be read",
    ),
    "label beyond": (
        with_mask(Image.new("L", (48, 32), 2)),
        r"00004\.png: has the label 2, and the row names 1 entities",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_cannot_be_decoded_is_found_before_training(
    root: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, message = SPOILT[kind]
    at = "abcd".index(trained(root))
    spoil(root)
    lines = rows()
    if "image" in kind:
        lines[at]["references"] = ["refs/red.png", "refs/own.png"]
    if "mask" in kind or "label" in kind:
        lines[at] |= {"masks": "masks", "entities": ["block"]}
    write_jsonl(root, lines)
    line = f"metadata.jsonl line {at + 1}: .*{message}.*; mend .* data.on_bad_video=skip"
    with pytest.raises(UserError, match=line):
        both_splits(root)
    with caplog.at_level(logging.WARNING):
        kept = both_splits(root, on_bad_video="skip")
    assert kept.keys() == {row["file_name"] for row in lines if row is not lines[at]}
    (said,) = [record.getMessage() for record in caplog.records]
    assert "1 of " in said and re.search(message, said)


def test_frames_that_no_clip_shows_may_be_damaged(root: Path) -> None:
    spoil_video(root)
    assert len(both_splits(root, fps=12)) == 4


def test_hdr_colours_are_told_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "bd":
        with av.open(str(root / "clips" / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=12)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            stream.codec_context.color_trc = 18
            for frame_HWC in noise(24).numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, "rgb24")))
            container.mux(stream.encode())
    with caplog.at_level(logging.WARNING):
        notes = [note for _ in range(2) for split in SPLITS for note in notes_of(root, split)]
    assert [record.getMessage() for record in caplog.records] == notes[: len(notes) // 2]
    assert all("have HDR colours (HLG), which are read as stored" in note for note in notes)


def notes_of(root: Path, split: Split) -> tuple[str, ...]:
    return FolderDataset(config(root), split).notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": " "}, "line 2: caption is missing or empty"),
        ({"caption": None}, "line 2: caption is missing or empty"),
        ({"text": "b"}, "line 2: has both caption and text"),
        ({"file_name": 3}, "line 2: file_name must be a text, not 3"),
        ({"file_name": "../a.mp4"}, "line 2: '../a.mp4' must be a path inside"),
        ({"file_name": "/etc/passwd"}, "line 2: '/etc/passwd' must be a path inside"),
        ({"references": ["refs/../../x.png", "refs/red.png"]}, "line 2: .* must be a path inside"),
        (
            {"references": ["outside/x.png", "refs/red.png"]},
            "line 2: .* is a link out of",
        ),
        ({"references": "refs/red.png"}, "line 2: references must be a list"),
        ({"reference_names": ["only"]}, "line 2: 1 reference_names for 2 references"),
        ({"reference_phrase": ["x"]}, "line 2: unknown column .* did you mean 'reference_phrases'"),
        ({"start": "soon"}, "line 2: start must be a number"),
        ({"start": -1}, "line 2: start must be a number"),
        ({"masks": "refs"}, "line 2: masks and entities go together"),
    ],
)
def test_bad_rows_are_named_by_line(
    root: Path, tmp_path_factory: pytest.TempPathFactory, change: dict[str, Any], message: str
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "x.png").write_bytes((root / "refs" / "red.png").read_bytes())
    (root / "outside").symlink_to(outside, target_is_directory=True)
    lines = rows()
    lines[1].update(change)
    write_jsonl(root, lines)
    with pytest.raises(UserError, match=message):
        FolderDataset(config(root, on_bad_video="skip"), "train")


def test_captions_may_hold_any_character(root: Path) -> None:
    caption = "one\u2028two\x0bthree, “ünï” | \n"
    lines = [json.dumps({**row, "caption": caption}, ensure_ascii=False) for row in rows()]
    (root / "metadata.jsonl").write_text("\r\n".join(lines), "utf-8")
    assert {sample.caption for sample in both_splits(root).values()} == {caption}


def test_other_columns_are_ignored(root: Path) -> None:
    write_jsonl(root, [{**row, "width": 48, "aesthetic": 5.5, "tags": []} for row in rows()])
    assert len(both_splits(root)) == 4


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("metadata.jsonl", '{"file_name": "clips/a.mp4"\n', "line 1: is not valid JSON"),
        ("metadata.jsonl", '\n["clips/a.mp4"]\n', "line 2: must be an object"),
        ("metadata.jsonl", "", "lists no clip"),
        ("metadata.json", '{"file_name": "a"}', "must hold a list"),
        ("metadata.csv", "file_name,caption\nclips/a.mp4,a, b\n", "line 2: has more cells"),
        ("metadata.csv", "file_name,caption\nclips/a.mp4,\n", "line 2: caption is missing"),
        ("metadata.csv", "file_name,caption,start\nclips/a.mp4,a,x\n", "line 2: start 'x'"),
        ("metadata.csv", "file_name,caption\n" + "a" * 200_000 + ",a\n", "is not valid CSV"),
        ("metadata.txt", "clips/a.mp4", "must end in .jsonl, .json, .csv"),
    ],
)
def test_bad_metadata_files_are_explained(
    root: Path, name: str, contents: str, message: str
) -> None:
    (root / name).write_text(contents)
    with pytest.raises(UserError, match=message):
        FolderDataset(config(root, metadata=name), "train")


def test_missing_folder_or_metadata(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path: there is no folder"):
        FolderDataset(config(root / "gone"), "train")
    with pytest.raises(UserError, match=r"data\.metadata: .* does not exist"):
        FolderDataset(config(root, metadata="gone.jsonl"), "train")


def test_one_video_cannot_be_split(root: Path) -> None:
    write_jsonl(root, rows()[:1])
    assert len(FolderDataset(config(root), "val")) == 1
    with pytest.raises(UserError, match="no clip left in the train split"):
        FolderDataset(config(root), "train")


def test_registry_builds_what_the_recipe_names(root: Path) -> None:
    assert set(DATASETS) >= {"shapes", "folder"}
    for name, row in DATASETS.items():
        assert get_args(row.config.model_fields["name"].annotation) == (name,)
        assert {
            "frames",
            "size",
            "fps",
            "references",
            "cache",
            "workers",
            "prefetch",
        } <= row.config.model_fields.keys()
        assert issubclass(row.config, ClipsConfig) and callable(pkgutil.resolve_name(row.dataset))
    assert isinstance(build_dataset(config(root), "train"), FolderDataset)


def test_columns_of_another_name_are_told_once(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{**row, "subject_image": row["references"][0], "width": 48} for row in rows()]
    for line in lines[1:]:
        del line["references"], line["reference_names"], line["reference_phrases"]
    write_jsonl(root, lines)
    with caplog.at_level(logging.WARNING):
        train, val = (FolderDataset(config(root), split) for split in ("train", "val"))
    assert [record.getMessage() for record in caplog.records] == [
        f"{root / 'metadata.jsonl'}: nothing reads the column 'subject_image'; did you mean "
        "'references'?"
    ]
    shares = {train.share_with_references(), val.share_with_references()}
    assert shares in ({0.0, 1.0}, {1 / 3, 0.0})


@pytest.mark.parametrize(
    ("column", "meant"),
    [
        ("reference_image", "references"),
        ("ref_images", "references"),
        ("Mask_dir", "masks"),
        ("prompt", "caption"),
        ("start_time", "start"),
        ("fps", None),
        ("source", None),
    ],
)
def test_what_a_column_sounds_like(root: Path, column: str, meant: str | None) -> None:
    write_jsonl(root, [{**row, column: "x"} for row in rows()])
    found = misnamed_columns(read_rows(root, "metadata.jsonl"))
    assert found == ({} if meant is None else {column: meant})
