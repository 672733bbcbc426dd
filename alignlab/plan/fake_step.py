"""One optimizer step of a run on fake tensors, by the run's own `Trainer.step`.

What it multiplies and what it holds at its peak, by part. One micro-batch stands for all: where
there are several it is not the first, and finds their gradients.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alignlab.config.run import RunConfig
from alignlab.models.experts import noise_window
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_clips import FakeEncoder
from alignlab.plan.fake_models import cuda_autocast
from alignlab.plan.fake_run import build_fake_run
from alignlab.plan.fake_values import fake_values, on_host
from alignlab.plan.flops import FlopCounter
from alignlab.plan.live_memory import LiveMemory, Peak
from alignlab.plan.parts import Parts
from alignlab.train import RunTrainer
from alignlab.training.checkpoint import TrainState
from alignlab.training.encoded import FeatureRead
from alignlab.training.flow_matching import FlowWeights
from alignlab.training.optim import step_unless
from alignlab.training.setup import Run

WEIGHTS, GRADIENTS, OPTIMIZER, EMA = "weights", "gradients", "optimizer state", "moving averages"
TEACHERS = "teachers"
SHARED = frozenset({WEIGHTS, GRADIENTS, OPTIMIZER, EMA})
"""What GPUs that share a model in shards have a part each of."""


@dataclass(frozen=True)
class TeacherCost:
    """What a teacher's features of a clip cost.

    Args:
        alias: the recipe's name of the teacher.
        kind: of which tokens, `video` or `reference`.
        weights: bytes of the teacher.
        flops: of a clip.
        peak: bytes while they are made, weights included.
        shape: of the features.
        is_half: they are bf16's numbers.
    """

    alias: str
    kind: str
    weights: int
    flops: int
    peak: int
    shape: tuple[int, ...]
    is_half: bool


@dataclass(frozen=True)
class FakeStep:
    """What a step costs.

    Args:
        parameters: of the transformer.
        blocks: of it.
        trained: parameters that are trained, projectors included.
        projectors: those of objectives among them.
        gradients: bytes of a gradient of all that is trained.
        saved: bytes of the weights that a checkpoint holds, without moving averages.
        flops: of a micro-batch, by part.
        unknown: operations that no formula counts.
        peaks: of a step, the highest first, and what may be the highest if it is shared.
        standing: bytes that are there between steps, by what they are.
        teachers: what features of a clip cost.
    """

    parameters: int
    blocks: int
    trained: int
    projectors: int
    gradients: int
    saved: int
    flops: dict[str, int]
    unknown: frozenset[str]
    peaks: list[Peak]
    standing: dict[str, int]
    teachers: list[TeacherCost]

    @property
    def peak(self) -> Peak:
        """The most that a step holds."""
        return self.peaks[0]


def fake_step(
    config: RunConfig,
    architectures: Architectures,
    *,
    samples: int | None = None,
    is_cuda: bool = True,
    in_shards: bool = False,
) -> FakeStep:
    """Takes steps of a run on fake tensors.

    Args:
        config: of the run.
        architectures: where settings of models are.
        samples: of a micro-batch; None: as the recipe's on one GPU.
        is_cuda: teachers in bf16, and autocast as on CUDA; else as on a CPU.
        in_shards: autocast keeps no bf16 copies of weights, as of a transformer in shards; what a
            step holds is whole all the same.

    Raises:
        UserError: the run could not be built either, or a model's settings are nowhere.
    """
    planned = planned_config(config, architectures, samples)
    flow_weights, window = FlowWeights(planned.flow), noise_window(planned.model)
    parts = Parts()
    live, counter = LiveMemory(parts.now), FlopCounter(parts.now)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    with fake_values(), ExitStack() as stack:
        run = build_fake_run(
            planned,
            flow_weights,
            window,
            architectures,
            parts,
            dtype=dtype,
            in_shards=in_shards,
        )
        if is_cuda:
            stack.enter_context(cuda_autocast(run.wan.transformer))
        with on_host():
            trainer = RunTrainer(run)
        teachers = {read.name: _teacher_cost_of(run, read) for read in _reads(run)}
        hold_run(live, run)
        stack.enter_context(run.branch)
        with live:
            follow_step(live, run.state, parts)
            warm_optimizer(run.state)
            if config.optim.accumulate > 1:
                give_gradients(run.state)
            live.start()
            with counter:
                trainer.step(trainer.micro_batches())
        return _found(run, live, counter, list(teachers.values()))


def _found(
    run: Run, live: LiveMemory, counter: FlopCounter, teachers: list[TeacherCost]
) -> FakeStep:
    return FakeStep(
        parameters=num_parameters(_own_parameters(run)),
        blocks=run.wan.num_blocks,
        trained=num_parameters(run.state.names),
        projectors=num_parameters(p for p in run.alignment.parameters() if p.requires_grad),
        gradients=num_bytes(run.state.names),
        saved=_saved(run),
        flops=dict(counter.parts),
        unknown=frozenset(counter.unknown),
        peaks=live.peaks(SHARED),
        standing=live.standing(),
        teachers=teachers,
    )


def planned_config(
    config: RunConfig, architectures: Architectures, samples: int | None
) -> RunConfig:
    """The run as it is planned: its model where its settings are, one micro-batch.

    Args:
        config: of the run.
        architectures: where settings of models are.
        samples: of a micro-batch; None: as the recipe's on one GPU.
    """
    samples = samples or config.optim.batch_size // config.optim.accumulate
    optim = config.optim.model_copy(update={"accumulate": 1, "batch_size": samples})
    folder = str(architectures.pipeline(config.model.path))
    model = config.model.model_copy(update={"path": folder})
    return config.model_copy(update={"optim": optim, "model": model})


def _reads(run: Run) -> list[FeatureRead]:
    grid = run.wan.latent_grid(run.config.data.frames, *run.config.data.size)
    return run.alignment.reads_on(grid, run.alignment.objectives)


def _teacher_cost_of(run: Run, read: FeatureRead) -> TeacherCost:
    clips = run.clips
    assert isinstance(clips, FakeEncoder)
    clip = clips[0]
    cost = teacher_cost(read, lambda: clip.computed(read))
    clips.shapes[read.name] = cost.shape
    return cost


def teacher_cost(read: FeatureRead, compute: Callable[[], Tensor]) -> TeacherCost:
    """What a teacher's features of a clip cost.

    Args:
        read: of which teacher.
        compute: has it make them.
    """
    live, counter = LiveMemory(), FlopCounter()
    read.teacher.load()
    model = read.teacher._late_model.loaded()
    weights = list(tensors_of(model))
    live.hold(TEACHERS, weights)
    with live, counter:
        features = compute()
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return TeacherCost(
        read.teacher.identity,
        read.kind,
        size,
        counter.total,
        live.peak().total,
        tuple(features.shape),
        any(weight.dtype == torch.bfloat16 for weight in model.parameters()),
    )


def warm_optimizer(state: TrainState) -> None:
    """Has the optimizer make its state, as the first step of a training does."""
    give_gradients(state)
    step_unless(state.optimizer, torch.zeros((), dtype=torch.bool))
    state.optimizer.zero_grad(set_to_none=True)


def give_gradients(state: TrainState) -> None:
    """Has a gradient on every trained parameter, as an earlier micro-batch leaves it."""
    for parameter in state.names:
        parameter.grad = torch.zeros_like(parameter)


def hold_run(live: LiveMemory, run: Run) -> None:
    """Tells a tracker of what there is before the first step."""
    live.hold(WEIGHTS, tensors_of(run.wan.transformer))
    live.hold(WEIGHTS, tensors_of(run.alignment))
    for average in (run.state.ema, run.state.self_teacher):
        live.hold(EMA, () if average is None else average.values())
    if not run.caches.values.keeps("teacher"):
        for teacher in run.alignment.teachers.values():
            live.hold(TEACHERS, tensors_of(teacher._late_model.loaded()))


def follow_step(live: LiveMemory, state: TrainState, parts: Parts | None = None) -> None:
    """Has gradients and the optimizer's state labelled as they are made."""
    for parameter in state.names:
        parameter.register_post_accumulate_grad_hook(lambda p: live.hold(GRADIENTS, [p.grad]))
    optimizer = state.optimizer

    def after(*_: object) -> None:
        states = (value for state in optimizer.state.values() for value in state.values())
        live.hold(OPTIMIZER, (value for value in states if isinstance(value, Tensor)))
        if parts is not None:
            parts.end()

    def before(*_: object) -> None:
        if parts is not None:
            parts.begin("optimizer")

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()


def _own_parameters(run: Run) -> Iterator[Tensor]:
    """The transformer's, without an adapter's."""
    for name, parameter in run.wan.transformer.named_parameters():
        if "lora_" not in name:
            yield parameter


def _saved(run: Run) -> int:
    """Bytes of what a checkpoint keeps of the weights: all, or what is trained beside a LoRA."""
    if run.state.is_lora:
        return num_bytes(run.state.names)
    trained = (p for p in run.alignment.parameters() if p.requires_grad)
    return num_bytes(run.wan.transformer.parameters()) + num_bytes(trained)


def num_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def num_parameters(parameters: Iterable[Tensor]) -> int:
    """Numbers in parameters."""
    return sum(parameter.numel() for parameter in parameters)
