"""The table of objectives. To add one: a file, a row here, a row in the contract test, a section
in README.md."""

from collections.abc import Mapping

from alignlab.losses.objective import Objective, ObjectiveConfig
from alignlab.losses.refalign import RefAlign
from alignlab.losses.repa import Repa

OBJECTIVES: dict[str, type[Objective]] = {
    "refalign": RefAlign,
    "repa": Repa,
}


def build_objective(
    config: ObjectiveConfig,
    *,
    student_dim: int,
    teacher_dims: Mapping[str, int],
    seed: int = 0,
) -> Objective:
    """Builds the objective that `config.name` names, with freshly initialised projectors.

    Args:
        config: an instance of `OBJECTIVES[name].Config`.
        student_dim: width of the student's hidden tokens.
        teacher_dims: width of each teacher's features by alias.
        seed: of the projectors' initial weights; the same seed gives the same bits. Global random
            state is neither read nor changed.

    Raises:
        ValueError: the name is not in `OBJECTIVES`, or a teacher of the config has no width.
    """
    if config.name not in OBJECTIVES:
        raise ValueError(f"unknown objective {config.name!r}: choose {', '.join(OBJECTIVES)}")
    missing = [alias for alias in config.teachers if alias not in teacher_dims]
    if missing:
        raise ValueError(
            f"objective {config.name!r} needs teacher {missing[0]!r}, "
            f"but there is only: {', '.join(teacher_dims) or 'none'}"
        )
    return OBJECTIVES[config.name](
        config, student_dim=student_dim, teacher_dims=teacher_dims, seed=seed
    )
