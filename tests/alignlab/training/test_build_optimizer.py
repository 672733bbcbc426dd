"""The optimizers of `optim.name`, held against torch's AdamW in fp32."""

import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from alignlab.config.optim import BYTES_PER_PARAMETER, AdamWConfig, OptimizerName, WeightsType
from alignlab.errors import UserError
from alignlab.training.build_optimizer import build_optimizer, check_optimizer
from alignlab.training.checkpoint import named_state, restore_state
from alignlab.training.kahan_adamw import REST, KahanAdamW
from alignlab.training.optim import step_unless
from host_syncs import META, HostSyncs

KINDS: list[tuple[OptimizerName, WeightsType]] = [
    ("adamw", "fp32"),
    ("adamw_8bit", "fp32"),
    ("adamw_bf16_kahan", "bf16"),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE = (64, 128)  # of more than 4096 numbers: 8 bits; the norm's weights have fp32 moments
STEPS = 200
GOOD, BROKEN = torch.tensor(False), torch.tensor(True)

pytestmark = pytest.mark.filterwarnings("error")


@dataclass
class Problem:
    """A linear map with a norm behind it, and what trains it towards another map.

    Args:
        weight: in the type that is tested.
        scale: fp32, as diffusers keeps norms.
        optimizer: over both.
    """

    weight: nn.Parameter
    scale: nn.Parameter
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, name: OptimizerName, dtype: torch.dtype, **settings: Any) -> "Problem":
        """Built as a run does; `settings` of the recipe."""
        weight = nn.Parameter(torch.full(SHAPE, 0.5, dtype=dtype))
        scale = nn.Parameter(torch.ones(SHAPE[0]))
        config = AdamWConfig(name=name, lr=1e-3, **settings)
        return cls(weight, scale, build_optimizer([weight, scale], config))

    @property
    def names(self) -> dict[Any, str]:
        return {self.weight: "weight", self.scale: "scale"}

    def train(self, first: int, last: int, *, is_broken: Tensor = GOOD) -> "Problem":
        """Steps from `first` on, each on inputs of its own."""
        target = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        for step in range(first, last):
            x = torch.randn(16, SHAPE[1], generator=torch.Generator().manual_seed(step + 1))
            y = x @ self.weight.float().T * self.scale
            (y - x @ target.T).square().mean().backward()
            step_unless(self.optimizer, is_broken)
            self.optimizer.zero_grad()
        return self

    def contents(self) -> dict[str, Tensor]:
        """Weights and state."""
        state = named_state(self.optimizer, self.names)
        weights = {name: p.detach() for p, name in self.names.items()}
        return {key: value.clone() for key, value in (state | weights).items()}

    def whole(self) -> Tensor:
        """The weight with the rest that is kept beside it."""
        rest = self.optimizer.state[self.weight].get(REST)
        weight = self.weight.detach().float()
        return weight if rest is None else weight + rest


@cache
def trained(name: OptimizerName, weights: WeightsType) -> Problem:
    return Problem.of(name, DTYPES[weights]).train(0, STEPS)


def off(problem: Problem) -> float:
    """How far a weight is from AdamW's in fp32, relative to what that was moved by."""
    expected = trained("adamw", "fp32").whole()
    return float((problem.whole() - expected).norm() / (expected - 0.5).norm())


def assert_same(mine: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert mine.keys() == others.keys()
    assert [key for key in mine if not torch.equal(mine[key], others[key])] == []


def test_8_bit_moments_lead_where_fp32_ones_do() -> None:
    problem = trained("adamw_8bit", "fp32")
    assert problem.optimizer.state[problem.weight]["state1"].dtype == torch.uint8
    assert 1e-4 < off(problem) < 0.03  # 0.012


def test_weights_in_bf16_with_their_rests_go_where_fp32_ones_do() -> None:
    assert off(trained("adamw_bf16_kahan", "bf16")) < 4e-3  # 0.0013


def test_without_rests_they_do_not() -> None:
    weight = nn.Parameter(torch.full(SHAPE, 0.5, dtype=torch.bfloat16))
    scale = nn.Parameter(torch.ones(SHAPE[0]))
    plain = torch.optim.AdamW([weight, scale], lr=1e-3, weight_decay=0.01, fused=True)
    assert off(Problem(weight, scale, plain).train(0, STEPS)) > 0.5  # 0.97


def test_fp32_weights_beside_them_take_the_step_of_adamw() -> None:
    mine = Problem.of("adamw_bf16_kahan", torch.float32).train(0, 5)
    theirs = Problem.of("adamw", torch.float32).train(0, 5)
    assert_same(mine.contents(), theirs.contents())


def test_a_second_moment_falls_where_gradients_do() -> None:
    """In bf16 it would not: 0.999 of a number is rounded to it."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = KahanAdamW([weight], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    for gradient in [1.0] * 3 + [0.0] * 500:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    moment = float(optimizer.state[weight]["exp_avg_sq"])
    assert moment == pytest.approx((1 - 0.999**3) * 0.999**500, rel=1e-3)


@pytest.mark.parametrize("name, weights", KINDS)
def test_a_broken_step_changes_nothing(name: OptimizerName, weights: WeightsType) -> None:
    problem = Problem.of(name, DTYPES[weights]).train(0, 3)
    state = problem.optimizer.state[problem.weight]
    if REST in state:  # half a step of rounding: the sum is a tie, which goes to the even side
        problem.weight.detach()[:] = 1 + 2**-7
        state[REST][:] = 2**-8
    before = problem.contents()
    problem.weight.grad = torch.full_like(problem.weight, torch.nan)
    problem.train(3, 4, is_broken=BROKEN)  # adds to it
    assert_same(problem.contents(), before)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name, weights", KINDS)
def test_a_restored_state_goes_on_as_it_would_have(
    name: OptimizerName, weights: WeightsType, offload: bool
) -> None:
    """Offloaded or not: the numbers are the same, so a run may be resumed either way."""
    whole = Problem.of(name, DTYPES[weights]).train(0, 6)
    half = Problem.of(name, DTYPES[weights], offload=offload).train(0, 3)
    rest = Problem.of(name, DTYPES[weights], offload=not offload)
    for mine, theirs in zip(rest.names, half.names, strict=True):
        mine.data.copy_(theirs.data)
    restore_state(rest.optimizer, rest.names, named_state(half.optimizer, half.names))
    assert_same(rest.train(3, 6).contents(), whole.contents())


@pytest.mark.parametrize("name, weights", KINDS)
def test_offloaded_state_stays_where_it_is(name: OptimizerName, weights: WeightsType) -> None:
    problem = Problem.of(name, DTYPES[weights], offload=True).train(0, 1)
    state = problem.optimizer.state[problem.weight]
    places = {key: value.data_ptr() for key, value in state.items()}
    seen: list[Tensor] = []
    update = type(problem.optimizer).update  # type: ignore[attr-defined]

    def noting(self: Any, weight: Tensor, state: dict[str, Tensor], group: Any) -> None:
        seen.extend(value for value in state.values() if value.ndim)
        update(self, weight, state, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(problem.optimizer), "update", noting)
        problem.train(1, 2)
    assert {key: value.data_ptr() for key, value in state.items()} == places
    assert seen and {value.data_ptr() for value in seen}.isdisjoint(places.values())


@pytest.mark.parametrize("name, weights", KINDS)
def test_its_bytes_are_those_of_the_table(name: OptimizerName, weights: WeightsType) -> None:
    problem = trained(name, weights)
    state = problem.optimizer.state[problem.weight]
    held = sum(v.numel() * v.element_size() for v in state.values() if v.ndim)
    assert held / problem.weight.numel() == BYTES_PER_PARAMETER[name, weights]


def test_the_table_has_every_optimizer() -> None:
    assert {name for name, _ in KINDS} == set(get_args(OptimizerName))


@pytest.mark.parametrize("name, weights", KINDS)
def test_the_host_does_not_wait_for_the_device(
    name: OptimizerName, weights: WeightsType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = "_get_fused_kernels_supported_devices"
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], fused, lambda: ["meta"])
    weight = nn.Parameter(torch.empty(SHAPE, dtype=DTYPES[weights], device=META))
    scale = nn.Parameter(torch.empty(SHAPE[0], device=META))
    optimizer = build_optimizer([weight, scale], AdamWConfig(name=name))

    def step() -> None:
        for parameter in (weight, scale):
            parameter.grad = torch.empty_like(parameter)
        step_unless(optimizer, torch.empty((), dtype=torch.bool, device=META))

    step()  # the first brings the tables of 8 bits to the device
    with HostSyncs() as syncs:
        step()
    assert syncs.names == []


def test_offloading_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"^optim\.offload: weights are on cpu, .*remove it"):
        check_optimizer(AdamWConfig(offload=True), torch.device("cpu"))


def test_without_its_package_8_bit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "bitsandbytes" else find(name, *args),
    )
    with pytest.raises(UserError, match=r"^optim\.name: .*alignlab\[bitsandbytes\].*adamw$"):
        check_optimizer(AdamWConfig(name="adamw_8bit"), torch.device("cpu"))
    check_optimizer(AdamWConfig(), torch.device("cpu"))
