"""A run of fake tensors: its own classes, built as `alignlab.training.setup.build_run` builds them.

Call these within `fake_values`.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from alignlab.config.run import RunConfig, check_blocks
from alignlab.distributed.ranks import Ranks, mixed_precision
from alignlab.losses.stage1.folder import without_weights
from alignlab.models.experts import Window
from alignlab.models.wan import Wan
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_clips import FakeEncodedValues, FakeEncoder
from alignlab.plan.fake_models import CPU, FakeParts, fake_teacher, fake_wan
from alignlab.plan.parts import Parts
from alignlab.teachers import DiffusionTeacher, Teacher
from alignlab.training.alignment import Alignment
from alignlab.training.flow_matching import FlowWeights
from alignlab.training.run_alignment import alignment_to
from alignlab.training.setup import Caches, Run, hooked, initial_state

TEACHER, TRANSFORMER, LOSSES, PROJECTORS = "teacher", "transformer", "losses", "projectors"
AVERAGE, STAGE1 = "student's average", "Stage 1 network"


class FakeRanks(Ranks):
    """One rank, on no device that is there.

    Args:
        precision: of the run.
        in_shards: as a rank computes that has a part of the weights.
    """

    def __init__(self, precision: str, in_shards: bool) -> None:
        self.device, self.precision = CPU, precision
        self.rank, self.world_size = 0, 1
        self._in_shards = in_shards

    def autocast(self) -> AbstractContextManager[Any]:
        return mixed_precision(self.device, self.precision, cache=not self._in_shards)


def build_fake_run(
    config: RunConfig,
    flow_weights: FlowWeights,
    window: Window,
    architectures: Architectures,
    parts: Parts,
    *,
    dtype: torch.dtype,
    in_shards: bool = False,
) -> Run:
    """Everything that a run trains with, before its first step.

    Args:
        config: of the run.
        flow_weights, window: of the run, which need values.
        architectures: where settings of models are.
        parts: is told which module is which part.
        dtype: of teachers.
        in_shards: as a rank computes that has a part of the weights.

    Raises:
        UserError: the run could not be built either, or a model's settings are nowhere.
    """
    wan = fake_wan(config, architectures.pipeline(config.model.path))
    check_blocks(config, wan.num_blocks)
    used = {name for objective in config.objectives.values() for name in objective.teachers}
    teachers: dict[str, Teacher | DiffusionTeacher] = {
        alias: fake_teacher(alias, teacher, config.data, wan.frozen, architectures, dtype=dtype)
        for alias, teacher in config.teachers.items()
        if alias in used
    }
    alignment = _alignment(config, wan, teachers)
    self_teacher, branch = hooked(config, wan, alignment, window)
    values = FakeEncodedValues(config.data.cache)
    assert isinstance(wan.frozen, FakeParts)
    clips = FakeEncoder(wan.frozen, config, values, lambda: parts.within(TEACHER))
    run = Run(
        config,
        FakeRanks(config.model.precision, in_shards),
        wan,
        alignment,
        initial_state(config, wan, alignment, self_teacher),
        clips,
        clips,
        flow_weights,
        branch,
        Caches(values),
        (),
        self_teacher,
        window,
    )
    _follow(run, parts)
    return run


def _alignment(
    config: RunConfig, wan: Wan, teachers: Mapping[str, Teacher | DiffusionTeacher]
) -> Alignment:
    """As `alignlab.training.run_alignment` makes it; Stage 1 networks are not read."""
    grid = wan.latent_grid(config.data.frames, *config.data.size)
    with without_weights(text_dim=wan.frozen.text.dim):
        return alignment_to(teachers, config, wan, grid, CPU)


def _follow(run: Run, parts: Parts) -> None:
    """Names what runs."""
    parts.follow(run.wan.transformer, lambda: TRANSFORMER if torch.is_grad_enabled() else AVERAGE)
    for objective in run.alignment.objectives.values():
        parts.follow(objective, lambda: LOSSES)
        for child in objective.children():
            is_trained = any(parameter.requires_grad for parameter in child.parameters())
            part = PROJECTORS if is_trained else STAGE1
            is_container = type(child).__name__ in ("ModuleDict", "ModuleList")
            for module in child.children() if is_container else (child,):
                parts.follow(module, lambda part=part: part)  # type: ignore[misc]
