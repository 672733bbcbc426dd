"""Clips of `shapes` as a folder data set whose rows say where subjects are in the first frame.

Shape letters: T frames, H height, W width, E entities.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from alignlab.config.data import FolderConfig, ShapesConfig
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.data.video import write_mp4
from alignlab.masks.segmenter import box_of


def export_shapes(
    root: Path, shapes: ShapesConfig, clips: int
) -> tuple[FolderConfig, list[Tensor]]:
    """Writes clips, and rows with `entities` and `boxes` of those seen in the first frame.

    Returns:
        settings that read the folder, and the true masks of those entities, bool `(E, T, H, W)`.
    """
    dataset, rows, truths = ShapesDataset(shapes, "train"), [], []
    for index in range(clips):
        sample = dataset[index]
        assert sample.masks_ETHW is not None
        write_mp4(root / "clips" / f"{index}.mp4", sample.video_THWC, shapes.fps)
        boxes = [box_of(mask_HW.numpy()) for mask_HW in sample.masks_ETHW[:, 0]]
        seen = [number for number, box in enumerate(boxes) if box is not None]
        rows.append(
            {
                "file_name": f"clips/{index}.mp4",
                "caption": sample.caption,
                "entities": [sample.entities[number] for number in seen],
                "boxes": [boxes[number] for number in seen],
            }
        )
        truths.append(sample.masks_ETHW[seen])
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FolderConfig(
        path=str(root), frames=shapes.frames, size=shapes.size, fps=shapes.fps, val_fraction=0.5
    )
    return config, truths


def export_masked_shapes(root: Path, shapes: ShapesConfig, clips: int) -> FolderConfig:
    """Writes clips with their true masks, and rows that say who is who across clips."""
    dataset, rows = ShapesDataset(shapes, "train"), []
    for index in range(clips):
        sample = dataset[index]
        assert sample.masks_ETHW is not None
        write_mp4(root / "clips" / f"{index}.mp4", sample.video_THWC, shapes.fps)
        numbers = torch.arange(1, len(sample.entities) + 1)[:, None, None, None]
        labels_THW = (sample.masks_ETHW * numbers).amax(0).to(torch.uint8)
        folder = root / "masks" / str(index)
        folder.mkdir(parents=True)
        for frame, labels_HW in enumerate(labels_THW):
            Image.fromarray(labels_HW.numpy(), "L").save(folder / f"{frame:05d}.png")
        names = {reference.phrase: reference.name for reference in sample.references}
        rows.append(
            {
                "file_name": f"clips/{index}.mp4",
                "caption": sample.caption,
                "masks": f"masks/{index}",
                "entities": list(sample.entities),
                "entity_names": [names.get(e, f"{e} of {index}") for e in sample.entities],
            }
        )
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FolderConfig(
        path=str(root), frames=shapes.frames, size=shapes.size, fps=shapes.fps, val_fraction=0.5
    )


def overlap(first_HW: Tensor, second_HW: Tensor) -> float:
    """Intersection over union; 1 where both are empty."""
    either = int((first_HW | second_HW).sum())
    return int((first_HW & second_HW).sum()) / either if either else 1.0


def carried_box(video_THWC: Tensor, box: list[int]) -> Tensor:
    """The baseline: a filled box, moved by the median optical flow in it; in the last frame."""
    from alignlab.stage1.moalign import dis_flow

    height, width = video_THWC.shape[1:3]
    corners = torch.tensor(box, dtype=torch.float32)

    def inside(place: Tensor) -> tuple[slice, slice]:
        left, top, right, bottom = (int(value.round()) for value in place)
        return slice(max(0, top), max(0, bottom)), slice(max(0, left), max(0, right))

    for flow_HWC in dis_flow(video_THWC):
        part_NC = flow_HWC[inside(corners)].flatten(0, 1)
        if len(part_NC):
            corners = corners + part_NC.median(0).values.repeat(2)
    mask_HW = torch.zeros(height, width, dtype=torch.bool)
    mask_HW[inside(corners)] = True
    return mask_HW
