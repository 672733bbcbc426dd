"""Speed and memory of the operations: what `alignlab bench kernels` measures of one case.

A provider is the name of an implementation, a function as `module:function`, `compile`
(torch.compile of `eager`) or `floor` (the bare matrix products). All run the operation with its
default settings (`local_gram` with unit vectors, as its objective) and sum its terms.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from alignlab.kernels.bench.cases import Case, Inputs, Op, draw_inputs
from alignlab.kernels.bench.floor import floor_step, minimum_flops
from alignlab.kernels.bench.measure import Spread, Step, peak_extra_mib, time_steps
from alignlab.kernels.dispatch import Impl
from alignlab.kernels.local_gram import local_gram
from alignlab.kernels.plugins import FOREIGN, load_function, raised, signature_problem
from alignlab.kernels.pull_push import pull_push
from alignlab.kernels.registry import OPERATIONS
from alignlab.kernels.relation import relation_distance

Provider = str
Mode = Literal["forward", "full"]
Metric = Literal["speed", "memory"]
PROVIDERS: tuple[Provider, ...] = ("floor", "eager", "compile", "chunked", "triton")
"""Those of alignlab itself."""
MODES: tuple[Mode, ...] = get_args(Mode)
UNITS: dict[Metric, str] = {"speed": "ms", "memory": "MiB"}

# Held at the peak for each pair of tokens, whatever the dtype of the inputs; measured.
BYTES_PER_PAIR: dict[tuple[Op, Provider], int] = {
    ("pull_push", "eager"): 14,
    ("pull_push", "compile"): 6,
    ("relation", "eager"): 48,
    ("relation", "compile"): 10,
}

Loss = Callable[[Inputs], Tensor]


class Measurement(NamedTuple):
    """One figure: milliseconds, or MiB beyond the inputs; `flops` is the minimum for that case and
    mode, or what `floor` did, which may be more."""

    case: Case
    provider: Provider
    mode: Mode
    metric: Metric
    spread: Spread
    flops: int


class LeftOut(NamedTuple):
    """What was not measured, and why."""

    what: str
    reason: str


def missing(op: Op, provider: Provider, device: torch.device) -> str | None:
    """Gives the reason why a provider cannot be measured on `device`, or None if it can.

    Raises:
        ImplementationError: it is a function that cannot be imported.
    """
    if provider == "floor":
        return None
    if provider == "compile":
        compiler = os.environ.get("CXX", "g++")
        if device.type == "cpu" and not shutil.which(compiler):
            return f"torch.compile needs a C++ compiler, and there is no {compiler}"
        return None
    if provider == "triton" and device.type == "cpu":
        return "a CPU has only Triton's interpreter, whose speed says nothing"
    if is_function(provider):
        problem = signature_problem(load_function(provider), OPERATIONS[op].table["eager"])
        return None if problem is None else f"it {problem}"
    states = OPERATIONS[op].implementations()
    return states[provider] if provider in states else f"no package registers it for {op}"


def is_function(provider: Provider) -> bool:
    """Whether it is a function that is named as `module:function`."""
    return ":" in provider


def too_large(case: Case, provider: Provider, max_gib: float) -> str | None:
    """Gives the reason if the (N, N) matrices of a provider exceed `max_gib`, else None."""
    pairs = case.blocks * case.num_tokens**2
    needed = BYTES_PER_PAIR.get((case.op, provider), 0) * pairs / 1024**3
    return f"needs about {needed:.1f} GiB, more than {max_gib:g}" if needed > max_gib else None


def loss_function(op: Op, provider: Provider) -> Loss:
    """Builds the sum of the terms that a provider computes from inputs."""
    impl: Impl = "eager" if provider in ("compile", "floor") else provider
    if is_function(provider):
        impl = load_function(provider)

    def pull_push_loss(x: Inputs) -> Tensor:
        assert x.subject_ids is not None
        terms = pull_push(x.student, x.teacher, x.subject_ids, impl=impl)
        return (terms.pull + terms.push).sum()

    def relation_loss(x: Inputs) -> Tensor:
        terms = relation_distance(x.student, x.teacher, impl=impl)
        return (terms.spatial + terms.temporal).sum()

    def local_gram_loss(x: Inputs) -> Tensor:
        return local_gram(x.student, x.teacher, normalize=True, impl=impl).divergence.sum()

    losses: dict[Op, Loss] = {
        "pull_push": pull_push_loss,
        "relation": relation_loss,
        "local_gram": local_gram_loss,
    }
    loss = losses[op]
    if provider != "compile":
        return loss
    torch.compiler.reset()  # else the sizes of earlier cases count towards the limit of recompiles
    compiled: Loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return compiled


def with_gradient(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Computes the loss and its gradient with respect to the student."""
    student = inputs.student.detach().requires_grad_()
    value = loss(inputs._replace(student=student))
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def measure(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    seconds: float,
    on_progress: Callable[[str], None],
) -> tuple[list[Measurement], list[LeftOut]]:
    """Measures providers on one case: memory first, then time.

    Args:
        case: what to run.
        providers: checked before (`alignlab.kernels.bench.check`).
        device: where.
        seconds: time for each provider and mode.
        on_progress: called with what was just measured; `num_steps` says how often.

    Returns:
        The figures, and the providers for which a CUDA device had too little memory, or which are
        not alignlab's and fail at this size. `floor` has no memory figure: its buffers are made
        beforehand.
    """
    sets = _input_sets(case, device)
    losses = {p: loss_function(case.op, p) for p in providers if p != "floor"}
    measurements: list[Measurement] = []
    left_out: list[LeftOut] = []
    for provider in list(losses):
        try:
            measurements += _memory(case, provider, losses[provider], sets, device)
        except torch.OutOfMemoryError:
            del losses[provider]
            torch.cuda.empty_cache()  # what it held is in blocks that may fit no other provider
            left_out.append(LeftOut(f"{provider} on {case}", "the device has too little memory"))
        except FOREIGN as error:
            if provider in PROVIDERS:
                raise
            del losses[provider]
            left_out.append(LeftOut(f"{provider} on {case}", raised(error)))
        on_progress(f"{case}: memory of {provider}")
    for mode in MODES:
        steps: dict[Provider, Step] = {p: _step(loss, mode, sets) for p, loss in losses.items()}
        flops = dict.fromkeys(providers, minimum_flops(case, backward=mode == "full"))
        if "floor" in providers:
            steps["floor"], flops["floor"] = floor_step(case, device, backward=mode == "full")
        for name, times in time_steps(steps, device, seconds).items():
            measurements.append(Measurement(case, name, mode, "speed", times, flops[name]))
        on_progress(f"{case}: time of {mode}")
    return measurements, left_out


def _memory(
    case: Case, provider: Provider, loss: Loss, sets: list[Inputs], device: torch.device
) -> list[Measurement]:
    measurements = []
    for mode in MODES:
        peak = peak_extra_mib(_step(loss, mode, sets), device)
        flops = minimum_flops(case, backward=mode == "full")
        measurements.append(
            Measurement(case, provider, mode, "memory", Spread(peak, peak, peak), flops)
        )
    return measurements


def num_steps(providers: Sequence[Provider]) -> int:
    """Counts the calls of `on_progress` in `measure`."""
    return len([p for p in providers if p != "floor"]) + len(MODES)


def _input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Draws as many inputs as do not fit into twice the L2 cache of a CUDA device; else one."""
    inputs = draw_inputs(case, device, seed=0)
    if device.type != "cuda":
        return [inputs]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [
        inputs,
        *(draw_inputs(case, device, seed) for seed in range(1, 1 + 2 * cache // inputs.nbytes())),
    ]


def _step(loss: Loss, mode: Mode, sets: list[Inputs]) -> Step:
    rotation = itertools.cycle(sets)

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(next(rotation))

    def full() -> tuple[Tensor, Tensor]:
        return with_gradient(loss, next(rotation))

    return full if mode == "full" else forward
