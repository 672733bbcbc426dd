"""Stage 1 folders with untrained networks."""

from pathlib import Path
from typing import Any

from alignlab.losses.stage1.folder import Stage1Info, Stage1Teacher, save_stage1
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig
from alignlab.losses.stage1.saliency_aligner import SaliencyAligner, SaliencyAlignerConfig


def write_untrained(
    folder: Path,
    *,
    teacher: str,
    dim: int,
    wan: str,
    text_dim: int,
    grid: tuple[int, int] = (3, 3),
) -> Path:
    """Writes `sara/` and `moalign/` into the folder, for a DINOv2 teacher.

    Args:
        folder: is there.
        teacher: path of the teacher, of which the recipe takes the feature `post_norm`.
        dim: width of its features.
        wan: path of the pipeline whose texts are read.
        text_dim: width of their embeddings.
        grid: of the teacher's tokens.
    """
    aligner = SaliencyAligner(
        SaliencyAlignerConfig(teacher_dim=dim, text_dim=text_dim, heads=2, hidden=16, embed_dim=8)
    )
    head = MotionHead(MotionHeadConfig(teacher_dim=dim, width=6, hidden=8, decoder=4))
    read = Stage1Teacher(family="dinov2", path=teacher, feature="post_norm")
    for kind, module, text in (("sara", aligner, wan), ("moalign", head, None)):
        (folder / kind).mkdir()
        info: dict[str, Any] = {
            "kind": kind,
            "teacher": read,
            "teacher_dim": dim,
            "grid": grid,
            "text": text,
        }
        save_stage1(folder / kind, module, Stage1Info(**info, module=module.config))
    return folder
