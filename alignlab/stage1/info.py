"""What a Stage 1 training writes beside its weights."""

from alignlab.losses.stage1.folder import Stage1Info, Stage1Teacher
from alignlab.losses.stage1.motion_head import MotionHeadConfig
from alignlab.losses.stage1.saliency_aligner import SaliencyAlignerConfig
from alignlab.stage1.config import Stage1Config
from alignlab.teachers import Teacher


def stage1_info(
    config: Stage1Config,
    module: SaliencyAlignerConfig | MotionHeadConfig,
    teacher: Teacher,
    *,
    text: str | None = None,
) -> Stage1Info:
    """Describes a network that was trained with `config`.

    Args:
        config: of the training.
        module: shape of the network.
        teacher: whose tokens it read.
        text: the model whose text encoder it read.
    """
    row = config.teacher
    assert row.path is not None and row.feature is not None  # the family's, if left out
    return Stage1Info(
        kind=config.stage1.kind,
        teacher=Stage1Teacher(
            family=row.family, path=row.path, feature=row.feature, weights=teacher.digest()
        ),
        teacher_dim=module.teacher_dim,
        grid=config.grid,
        text=text,
        module=module,
    )
