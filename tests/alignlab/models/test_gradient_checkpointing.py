"""Modes of gradient checkpointing: what they give, what they keep, and what is refused."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from alignlab.config.model import LoraConfig, ModelConfig
from alignlab.config.validation_errors import first_problem
from alignlab.errors import UserError
from alignlab.models.reference_branch import Output, ReferenceBranch
from alignlab.models.taps import Kind, Taps
from alignlab.models.wan import load_wan
from alignlab.recipe import load_run, recipe_hash
from random_tensors import draw

MODES = (False, True, "every:2", "every:4", "ops")
KINDS: dict[int, set[Kind]] = {1: {"video", "reference", "attention"}, 2: {"attention"}}
COUNTS = (2, 0, 2)


def batch() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Three videos of 2x2x3 tokens with two, none and two references."""
    references = [draw(k, 16, 4, 6, seed=3 + i) for i, k in enumerate(COUNTS)]
    return (
        draw(3, 16, 2, 4, 6),
        torch.tensor([100.0, 500.0, 900.0]),
        draw(3, 16, 32, seed=1),
        references,
    )


def loss_of(out: Output) -> Tensor:
    tapped = [tap.of(kind).tokens_BND for b, tap in out.taps.items() for kind in sorted(KINDS[b])]
    return torch.stack([x.square().mean() for x in (*tapped, out.velocity_BCTHW)]).sum()


def gradients(folder: Path, *, clean: bool = False, **settings: Any) -> list[Tensor]:
    """Of what is trained, after two backward passes through one graph; tapped tokens before."""
    model: WanTransformer3DModel = load_wan(str(folder), **settings).transformer
    taps = Taps(model, list(KINDS), list(KINDS))
    timestep: Any = {"reference_timestep": "zero"} if clean else {}
    with ReferenceBranch(model, taps=taps, kinds=KINDS, **timestep) as branch:
        out = branch(*batch())
        counts = {b: [len(x) for x in found] for b, found in out.outputs.items()}
        assert counts == {b: [1, 2] for b in KINDS}  # each group once
        loss = loss_of(out)
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(loss, trained, allow_unused=True)
        assert {b: [len(x) for x in found] for b, found in out.outputs.items()} == counts
    pairs = [(a, b) for a, b in zip(first, again, strict=True) if a is not None and b is not None]
    assert pairs and all(torch.equal(*pair) for pair in pairs)
    return [loss.detach(), *(gradient for gradient, _ in pairs)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"train": "lora", "lora": LoraConfig(rank=2)}, {"clean": True}],
    ids=["full", "lora", "timesteps-of-tokens"],
)
def test_every_mode_gives_the_bits_of_none_and_a_graph_that_is_read_twice(
    wan_folder: Path, settings: dict[str, Any]
) -> None:
    plain, *others = (gradients(wan_folder, gradient_checkpointing=m, **settings) for m in MODES)
    assert any(gradient.any() for gradient in plain[1:])
    for mode, found in zip(MODES[1:], others, strict=True):
        assert len(found) == len(plain), mode
        assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True)), mode


@cache
def held(folder: Path, mode: bool | str) -> int:
    """Bytes that a forward pass leaves allocated for the backward pass."""
    model = load_wan(str(folder), gradient_checkpointing=mode).transformer
    inputs = (draw(4, 16, 2, 32, 32), torch.full((4,), 500.0), draw(4, 16, 32, seed=1))
    model(*inputs)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        out = model(*inputs)
    assert out[0].requires_grad
    return sum(event.self_cpu_memory_usage for event in found.events())


def test_each_mode_holds_the_memory_that_it_promises(wan_folder: Path) -> None:
    none, full, second, fourth, ops = (held(wan_folder, mode) for mode in MODES_BY_MEMORY)
    assert full < second < fourth < none
    assert full < ops < none
    # half of four blocks, and a quarter of them
    assert second == pytest.approx((none + full) / 2, rel=0.05)
    assert fourth == pytest.approx((3 * none + full) / 4, rel=0.05)


MODES_BY_MEMORY = (False, True, "every:2", "every:4", "ops")


class Computed(TorchDispatchMode):
    """Names of operations that are computed, and not found where they were kept."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part in name for name in self.names)


def test_what_is_kept_is_not_computed_again(wan_folder: Path) -> None:
    def computed(mode: bool | str) -> Computed:
        model = load_wan(str(wan_folder), gradient_checkpointing=mode).transformer
        found = Computed()
        with found:
            model(*batch()[:3])[0].square().mean().backward()
        return found

    none, full, ops = (computed(mode) for mode in (False, True, "ops"))
    for part in ("aten.addmm", "flash_attention_for_cpu.default"):
        assert ops.count(part) == none.count(part) < full.count(part)
    assert ops.count("aten.gelu.default") > none.count("aten.gelu.default") > 0


def mistaken(value: Any) -> str:
    with pytest.raises(ValueError) as caught:
        ModelConfig(path="x", gradient_checkpointing=value)
    return first_problem(ModelConfig, caught.value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["every:1", "every:0", "every", "every:2.5", "some", None, 2])
def test_a_mode_that_there_is_not_is_refused(value: Any) -> None:
    assert mistaken(value).startswith(
        "gradient_checkpointing: expected true or false, full, ops, or every:k with k of 2 or more"
    )


def test_more_blocks_apart_than_there_are_is_refused_before_weights_are_read(
    wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*args: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("alignlab.models.wan.read_transformer", unread)
    expected = r"^model\.gradient_checkpointing: every:5, but this transformer has 4 blocks; set"
    with pytest.raises(UserError, match=expected):
        load_wan(str(wan_folder), gradient_checkpointing="every:5")


def hashes(values: Sequence[str]) -> list[str]:
    return [recipe_hash(load_run("tiny", [f"model.gradient_checkpointing={v}"])) for v in values]


def test_full_is_the_recipe_that_true_has_always_been() -> None:
    plain, true, full, second, ops = hashes(["false", "true", "full", "every:2", "ops"])
    assert true == full == "v2-4d6a2d0aa0f5"
    assert plain == recipe_hash(load_run("tiny"))
    assert len({plain, true, second, ops}) == 4
