"""The tables of objectives and of the Stage 1 networks that some of them read.

To add an objective: a file, a row here, a row in the contract test, a section in README.md. Other
packages add theirs by entry points.
"""

import functools
from collections.abc import Mapping

from alignlab.losses.align4gen import Align4Gen
from alignlab.losses.crepa import Crepa
from alignlab.losses.irepa import IRepa
from alignlab.losses.moalign import MoAlign
from alignlab.losses.objective import Objective, ObjectiveConfig
from alignlab.losses.plugins import lacks_name, registrations
from alignlab.losses.refalign import RefAlign
from alignlab.losses.repa import Repa
from alignlab.losses.sara import Sara
from alignlab.losses.stage1.folder import Stage1Row, stage1_rows
from alignlab.losses.videorepa import VideoRepa

GROUP = "alignlab.objectives"
"""Entry point group under which other packages register objectives."""

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
"""`BUILT_IN` and what installed packages add, looked up at its first use.

Not at import: a package's objective imports this package, which would import it in turn.
"""

STAGE1: dict[str, Stage1Row]
"""Stage 1 networks by the name of the objective that reads them, those of installed packages
included. The table is beside the code that loads them (`alignlab.losses.stage1.folder`), which
objectives import."""


def installed_objectives(built_in: Mapping[str, type[Objective]]) -> dict[str, type[Objective]]:
    """Loads the objectives of other packages, by name, in the order of their names.

    Args:
        built_in: rows whose names are taken.

    Raises:
        PluginError: a name is taken, or what it stands for is no final `Objective` whose
            `Config.name` is that name.
    """
    objectives: dict[str, type[Objective]] = {}
    for registration in registrations(GROUP, "objective", built_in):
        problem = _problem(registration.loaded, registration.name)
        if problem is not None:
            raise registration.refusal(problem)
        objective = registration.loaded
        assert isinstance(objective, type) and issubclass(objective, Objective)
        objectives[registration.name] = objective
    return objectives


def _problem(thing: object, name: str) -> str | None:
    """Says what keeps a thing from being the objective `name`."""
    if not (isinstance(thing, type) and issubclass(thing, Objective)):
        return "is no class derived from alignlab.losses.objective.Objective"
    if not getattr(thing, "__final__", False):
        return "is not final: put @typing.final above the class"
    if getattr(thing, "tokens", None) not in ("video", "reference"):
        return 'must say which tokens it taps: tokens = "video" or "reference"'
    config = getattr(thing, "Config", None)
    if not (isinstance(config, type) and issubclass(config, ObjectiveConfig)):
        return "has no Config derived from alignlab.losses.objective.ObjectiveConfig"
    return lacks_name(config, name)


@functools.cache
def _all_objectives() -> dict[str, type[Objective]]:
    return BUILT_IN | installed_objectives(BUILT_IN)


def __getattr__(name: str) -> object:
    if name == "OBJECTIVES":
        return _all_objectives()
    if name == "STAGE1":
        return stage1_rows()
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
