"""One optimizer step of a Stage 1 training on fake tensors, by its own `Stage1Trainer.step`.

Shape letters: T frames and P tokens per frame of the teacher, L text tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from alignlab.losses.objective import Features
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_clips import FakeClips, FakeEncodedValues
from alignlab.plan.fake_encoders import TextCosts, text_costs
from alignlab.plan.fake_models import CPU, FakeParts, fake_teacher
from alignlab.plan.fake_run import STAGE1, FakeRanks
from alignlab.plan.fake_step import (
    SHARED,
    TEACHERS,
    WEIGHTS,
    FakeStep,
    TeacherCost,
    follow_step,
    num_bytes,
    num_parameters,
    teacher_cost,
    tensors_of,
    warm_optimizer,
)
from alignlab.plan.fake_values import fake_values, on_host, tensors_in
from alignlab.plan.flops import FlopCounter
from alignlab.plan.live_memory import LiveMemory
from alignlab.plan.parts import Parts
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.task import FrozenModels
from alignlab.stage1.train import Stage1Trainer, teacher_grid
from alignlab.teachers import Teacher
from alignlab.training.encoded import ClipPixels, FeatureRead, kept_features
from alignlab.training.micro_batches import MicroBatches


@dataclass(frozen=True)
class FakeStage1:
    """What a Stage 1 training costs.

    Args:
        step: of it; its `parameters` are the network's.
        text: what its text encoder costs; None: it reads no text.
        texts: that are read of a clip.
    """

    step: FakeStep
    text: TextCosts | None
    texts: int


@dataclass(frozen=True)
class _FakeFrozenModels(FrozenModels):
    """Gives zeros on the host, which `_fake` then takes the values of.

    Args:
        features_shape: (T, P, D) of the teacher's features of a clip.
        max_tokens: that captions are padded to.
    """

    features_shape: tuple[int, ...] = ()
    max_tokens: int = 0

    def features(self, pixels: ClipPixels) -> Features:
        frames, *_ = self.features_shape
        return Features(torch.zeros(1, *self.features_shape), (frames, *self.grid))

    def embed(self, texts: Sequence[str]) -> Tensor:
        assert self.text is not None  # of a task that reads text
        return torch.zeros(len(texts), self.max_tokens, self.text.dim)


def fake_stage1(
    config: Stage1Config, architectures: Architectures, *, is_cuda: bool = True
) -> FakeStage1:
    """Takes a step of a Stage 1 training on fake tensors.

    Args:
        config: of the training.
        architectures: where settings of models are.
        is_cuda: the teacher is in bf16, as on CUDA.

    Raises:
        UserError: the training could not be built either, or a model's settings are nowhere.
    """
    planned, parts_of_model = _planned(config, architectures)
    clips, parts = FakeClips(planned.data, has_flow=True), Parts()
    live, counter = LiveMemory(parts.now), FlopCounter(parts.now)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    with fake_values():
        values = FakeEncodedValues(planned.data.cache)
        (alias,) = planned.teachers
        teacher = fake_teacher(
            alias, planned.teacher, planned.data, None, architectures, dtype=dtype
        )
        assert isinstance(teacher, Teacher)  # not one that reads latents, which is refused
        read = FeatureRead(teacher, "video", teacher_grid(planned))
        pixels = ClipPixels(FakeClips(planned.data), 0)
        cost = teacher_cost(read, lambda: kept_features(values, read, pixels))
        text = None if parts_of_model is None else parts_of_model.text
        models = _FakeFrozenModels(
            teacher,
            read.grid_HW,
            text,
            CPU,
            values,
            cost.shape,
            0 if parts_of_model is None else parts_of_model.max_tokens,
        )
        trainer = Stage1Trainer(planned, FakeRanks("fp32", in_shards=False), models, clips, clips)
        batch = _batch(trainer)
        step = _taken(trainer, batch, live, counter, parts, cost)
        with torch.no_grad():
            costs = None if parts_of_model is None else text_costs(parts_of_model)
    asked = trainer.task.texts(planned.stage1, clips, 0, measured=False)
    return FakeStage1(step, costs, len(asked))


def _planned(
    config: Stage1Config, architectures: Architectures
) -> tuple[Stage1Config, FakeParts | None]:
    """The training with its model where its settings are, and its text encoder if it has one."""
    if config.model is None:
        return config, None
    folder = architectures.pipeline(config.model.path)
    model = config.model.model_copy(update={"path": str(folder)})
    planned = config.model_copy(update={"model": model})
    if planned.text_model is None:
        return planned, None
    dtype = torch.bfloat16 if model.precision == "bf16" else torch.float32
    return planned, FakeParts(folder, dtype, CPU)


def _batch(trainer: Stage1Trainer) -> list[Any]:
    """The clips of a step as the task encodes them, without values."""
    with on_host():  # the task decides by masks and texts
        clips = [trainer.clips[index] for index in range(trainer.config.optim.batch_size)]
    return [_fake(clip) for clip in clips]


def _fake(clip: Any) -> Any:
    """An encoded clip with tensors that have shapes alone."""
    tensors = {
        field.name: torch.empty(value.shape)
        for field in fields(clip)
        if isinstance(value := getattr(clip, field.name), Tensor) and value.is_floating_point()
    }
    return replace(clip, **tensors)


def _taken(
    trainer: Stage1Trainer,
    batch: list[Any],
    live: LiveMemory,
    counter: FlopCounter,
    parts: Parts,
    teacher: TeacherCost,
) -> FakeStep:
    """What a step of a trainer costs, of those after the first."""
    network, state = trainer.task.network, trainer.state
    for module in network.modules():  # a task may call parts of it
        parts.follow(module, lambda: STAGE1)
    live.pass_over(tensor for clip in batch for tensor in tensors_in(vars(clip).values()))
    live.hold(WEIGHTS, tensors_of(network))
    if not trainer.models.values.keeps("teacher"):
        live.hold(TEACHERS, tensors_of(trainer.models.teacher._late_model.loaded()))
    with live:
        follow_step(live, state, parts)
        warm_optimizer(state)
        live.start()
        with counter:
            trainer.step(MicroBatches([lambda: batch]))
    return FakeStep(
        parameters=num_parameters(network.parameters()),
        blocks=0,
        trained=num_parameters(state.names),
        projectors=0,
        gradients=num_bytes(state.names),
        saved=num_bytes(network.parameters()),
        flops=dict(counter.parts),
        unknown=frozenset(counter.unknown),
        peaks=live.peaks(SHARED),
        standing=live.standing(),
        teachers=[teacher],
    )
