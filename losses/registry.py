"""The table of objectives. To add one: a file, a row here, a row in the contract test, a section
in README.md. Other packages add theirs by entry points (`alignlab.losses.plugins`)."""

import functools
from collections.abc import Mapping

from alignlab.losses.align4gen import Align4Gen
from alignlab.losses.crepa import Crepa
from alignlab.losses.irepa import IRepa
from alignlab.losses.moalign import MoAlign
from alignlab.losses.objective import Objective, ObjectiveConfig
from alignlab.losses.plugins import installed_objectives
from alignlab.losses.refalign import RefAlign
from alignlab.losses.repa import Repa
from alignlab.losses.sara import Sara
from alignlab.losses.videorepa import VideoRepa

BUILT_IN: dict[str, type[Objective]] = {
    "refalign": RefAlign,
    "repa": Repa,
    "irepa": IRepa,
    "align4gen": Align4Gen,
    "videorepa": VideoRepa,
    "sara": Sara,
    "moalign": MoAlign,
    "crepa": Crepa,
}

OBJECTIVES: dict[str, type[Objective]]
"""`BUILT_IN` and what installed packages add, looked up when it is first asked for.

Not at import: a package's objective imports this package, which would import it in turn.
"""


@functools.cache
def _all_objectives() -> dict[str, type[Objective]]:
    return BUILT_IN | installed_objectives(BUILT_IN)


def __getattr__(name: str) -> dict[str, type[Objective]]:
    if name == "OBJECTIVES":
        return _all_objectives()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    objectives = _all_objectives()
    if config.name not in objectives:
        raise ValueError(f"unknown objective {config.name!r}: choose {', '.join(objectives)}")
    missing = [alias for alias in config.teachers if alias not in teacher_dims]
    if missing:
        raise ValueError(
            f"objective {config.name!r} needs teacher {missing[0]!r}, "
            f"but there is only: {', '.join(teacher_dims) or 'none'}"
        )
    return objectives[config.name](
        config, student_dim=student_dim, teacher_dims=teacher_dims, seed=seed
    )
