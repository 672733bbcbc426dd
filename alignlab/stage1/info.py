"""What a Stage 1 training writes beside its weights."""

from alignlab.losses.motion_head import MotionHeadConfig
from alignlab.losses.saliency_aligner import SaliencyAlignerConfig
from alignlab.losses.stage1_folder import Stage1Info, Stage1Teacher
from alignlab.stage1.config import Stage1Config


def stage1_info(
    config: Stage1Config,
    module: SaliencyAlignerConfig | MotionHeadConfig,
    *,
    text: str | None = None,
) -> Stage1Info:
    """Describes a network that was trained with `config`.

    Args:
        config: of the training.
        module: shape of the network.
        text: the model whose text encoder it read.
    """
    teacher = config.teacher
    assert teacher.path is not None and teacher.feature is not None  # the family's, if left out
    return Stage1Info(
        kind=config.stage1.kind,
        teacher=Stage1Teacher(family=teacher.family, path=teacher.path, feature=teacher.feature),
        teacher_dim=module.teacher_dim,
        grid=config.grid,
        text=text,
        module=module,
    )
