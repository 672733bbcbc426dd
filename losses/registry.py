"""The tables of objectives and of the Stage 1 networks that some of them read.

To add an objective: a file, a row here, a row in the contract test, a section in README.md. Other
packages add theirs by entry points.
"""

import functools
from collections.abc import Mapping
from typing import get_args

from alignlab.losses.align4gen import Align4Gen
from alignlab.losses.attention_config import AttentionConfig
from alignlab.losses.crepa import Crepa
from alignlab.losses.dispersive import Dispersive
from alignlab.losses.haste_attention import HasteAttention
from alignlab.losses.irepa import IRepa
from alignlab.losses.layersync import LayerSync
from alignlab.losses.local_gram_flow import LocalGramFlow
from alignlab.losses.m2_repa import M2Repa
from alignlab.losses.moalign import MoAlign
from alignlab.losses.objective import (
    LATENTS,
    NoTeacherConfig,
    Objective,
    ObjectiveConfig,
    Reads,
    SelfTeacherConfig,
    self_key,
)
from alignlab.losses.plugins import lacks_name, registrations
from alignlab.losses.refalign import RefAlign
from alignlab.losses.repa import Repa
from alignlab.losses.sara import Sara
from alignlab.losses.self_flow import SelfFlow
from alignlab.losses.sra import Sra
from alignlab.losses.stage1.folder import Stage1Row, stage1_rows
from alignlab.losses.vae_repa import VaeRepa
from alignlab.losses.videorepa import VideoRepa

GROUP = "alignlab.objectives"
"""Entry point group under which other packages register objectives."""

BUILT_IN: dict[str, type[Objective]] = {
    "refalign": RefAlign,
    "repa": Repa,
    "irepa": IRepa,
    "align4gen": Align4Gen,
    "m2_repa": M2Repa,
    "videorepa": VideoRepa,
    "sara": Sara,
    "moalign": MoAlign,
    "crepa": Crepa,
    "layersync": LayerSync,
    "sra": Sra,
    "self_flow": SelfFlow,
    "vae_repa": VaeRepa,
    "dispersive": Dispersive,
    "local_gram_flow": LocalGramFlow,
    "haste_attention": HasteAttention,
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
    return lacks_name(config, name) or _misread(thing, config)


def _misread(objective: type[Objective], config: type[ObjectiveConfig]) -> str | None:
    """Says of an objective that does not go with what it says that it reads why so."""
    reads = objective.reads
    if reads not in get_args(Reads):
        return f"reads {reads!r}: choose {', '.join(get_args(Reads))}"
    if reads in ("latents", "self") and objective.tokens != "video":
        return f'reads {reads}, which is of the video: tokens = "video"'
    if reads == "teacher" and issubclass(config, NoTeacherConfig):
        return 'has a Config without a teacher: say what it reads, as reads = "nothing"'
    if issubclass(config, AttentionConfig) and objective.tokens != "video":
        return 'compares attention maps, which are of the video: tokens = "video"'
    base = SelfTeacherConfig if reads == "self" else NoTeacherConfig
    if reads != "teacher" and not issubclass(config, base):
        return f"reads {reads}: derive its Config from alignlab.losses.objective.{base.__name__}"
    return None


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
    latents_dim: int | None = None,
    seed: int = 0,
) -> Objective:
    """Builds the objective that `config.name` names, with freshly initialised projectors.

    Args:
        config: an instance of `OBJECTIVES[name].Config`.
        student_dim: width of the student's hidden tokens.
        teacher_dims: width of each teacher's features by alias.
        latents_dim: width of a token's patch of clean latents, for objectives that read them.
        seed: of the projectors' initial weights; the same seed gives the same bits. Global random
            state is neither read nor changed.

    Raises:
        ValueError: the name is not in `OBJECTIVES`, or a teacher of the config has no width, or the
            latents that the objective reads.
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
    if objectives[config.name].reads == "latents":
        if latents_dim is None:
            raise ValueError(f"objective {config.name!r} reads clean latents: give latents_dim")
        teacher_dims = {LATENTS: latents_dim}
    if isinstance(config, SelfTeacherConfig):
        teacher_dims = {self_key(block): student_dim for block in config.deep_blocks}
    return objectives[config.name](
        config, student_dim=student_dim, teacher_dims=teacher_dims, seed=seed
    )
