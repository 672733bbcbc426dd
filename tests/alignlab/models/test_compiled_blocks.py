"""Compiled blocks: the numbers of those that are not, one code for all, and what is refused."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch._dynamo.utils import counters

from alignlab.config.model import LoraConfig
from alignlab.errors import UserError
from alignlab.models import compiled_blocks
from alignlab.models.compiled_blocks import check_compiler
from alignlab.models.reference_branch import Output, ReferenceBranch
from alignlab.models.wan import load_wan
from alignlab.recipe import load_run
from alignlab.train import train
from random_tensors import draw
from tiny_runs import MakeConfig

COUNTS = (0, 2, 3, 1)
BLOCKS = (1, 3)


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What inductor gets, run as it is; counted from here on."""
    monkeypatch.setattr(compiled_blocks, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


def batch(
    *counts: int, frames: int = 2, height: int = 4
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    size = len(counts)
    references = [draw(k, 16, height, 6, seed=3 + k) for k in counts]
    text = draw(size, 16, 32, seed=1)
    return draw(size, 16, frames, height, 6), torch.linspace(200, 800, size), text, references


def load(folder: Path, *, compiled: bool, **settings: Any) -> WanTransformer3DModel:
    return load_wan(str(folder), compiled=compiled, **settings).transformer


def loss_of(out: Output) -> Tensor:
    tapped = [x.tokens_BND for tap in out.taps.values() for x in (tap.video, tap.reference)]
    return torch.stack([x.square().sum() / 1e3 for x in (*tapped, out.velocity_BCTHW)]).sum()


def trained(
    model: WanTransformer3DModel, counts: Sequence[int], blocks: Sequence[int]
) -> list[Tensor]:
    """Losses and tapped tokens of a step for each number of references."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    found: list[Tensor] = []
    with ReferenceBranch(model, blocks=blocks) as branch:
        for count in counts:
            out = branch(*batch(count))
            loss = loss_of(out)
            found += [loss.detach(), *(tap.video.tokens_BND.detach() for tap in out.taps.values())]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


def test_steps_are_those_of_eager_blocks_in_one_graph_however_many_are_tapped(
    wan_folder: Path,
) -> None:
    eager, model = (load(wan_folder, compiled=c) for c in (False, True))
    names = list(eager.state_dict())
    for blocks in (BLOCKS, (0, 1, 2, 3)):
        plain, found = trained(eager, COUNTS, blocks), trained(model, COUNTS, blocks)
        for mine, expected in zip(found, plain, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        assert graphs() == 1
    assert list(model.state_dict()) == names
    seen: list[int] = []
    with torch.no_grad(), ReferenceBranch(model, blocks=BLOCKS) as branch:
        for count, frames, height in ((1, 2, 4), (0, 3, 4), (2, 1, 6), (3, 4, 8)):
            given = batch(count, frames=frames, height=height)
            out = branch(*given)
            seen.append(graphs())
            with ReferenceBranch(eager, blocks=BLOCKS) as plain_branch:
                eager_out = plain_branch(*given)
            torch.testing.assert_close(
                out.velocity_BCTHW, eager_out.velocity_BCTHW, rtol=1e-4, atol=1e-5
            )
    assert seen == [2, 3, 3, 3]  # without a gradient, and once more for any size of video


def test_a_copy_runs_its_own_weights(wan_folder: Path) -> None:
    model = load(wan_folder, compiled=True)
    other = copy.deepcopy(model)
    given = (draw(1, 16, 2, 4, 6), torch.tensor([500.0]), draw(1, 16, 32, seed=1))
    with torch.no_grad():
        before = model(*given)[0]
        for parameter in other.blocks.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(other(*given)[0], before)
        assert torch.equal(model(*given)[0], before)


@pytest.mark.parametrize(
    ("mode", "settings", "clean"),
    [("every:2", {"train": "lora", "lora": LoraConfig(rank=2)}, False), ("ops", {}, True)],
)
def test_it_goes_with_gradient_checkpointing(
    wan_folder: Path, mode: str, settings: dict[str, Any], clean: bool
) -> None:
    """Twice through one graph, as `gradient_share` and diagnosis go; with a LoRA, and with
    timesteps of tokens."""
    timestep: Any = {"reference_timestep": "zero"} if clean else {}
    found = []
    for compiled in (False, True):
        checkpointing = mode if compiled else False
        model = load(
            wan_folder, compiled=compiled, gradient_checkpointing=checkpointing, **settings
        )
        weights = [p for p in model.parameters() if p.requires_grad]
        with ReferenceBranch(model, blocks=BLOCKS, **timestep) as branch:
            out = branch(*batch(2))
            loss = loss_of(out)
            first = torch.autograd.grad(loss, weights, retain_graph=True)
            again = torch.autograd.grad(loss, weights)
            assert all(len(tokens) == 1 for tokens in out.outputs.values())  # each seen once
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
        found.append(first)
    # nothing before a LoRA's first block has a gradient
    assert graphs() == (2 if settings else 1)
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_compiled_is_one_line_and_no_fall_back(wan_folder: Path) -> None:
    model = load(wan_folder, compiled=True)
    original = model.blocks[0].attn1.processor

    def breaks(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return original(*args, **kwargs)

    for block in model.blocks:
        block.attn1.processor = breaks
    given = (draw(1, 16, 2, 4, 6), torch.tensor([500.0]), draw(1, 16, 32, seed=1))
    with pytest.raises(
        UserError, match=r"^model\.compile: a block cannot be compiled \("
    ) as caught:
        model(*given)
    assert "\n" not in str(caught.value) and "model.compile=none" in str(caught.value)


def test_a_missing_compiler_is_told_before_weights_are_read(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("alignlab.models.wan.read_transformer", unread)
    expected = r"^model\.compile: needs a compiler \(no-such-compiler\): install"
    with pytest.raises(UserError, match=expected):
        train(make_config("model.compile=blocks"))
    with pytest.raises(UserError, match=r"^model\.compile: .* not mps; or set model\.compile=none"):
        check_compiler("mps")


def test_tapped_attention_and_compiled_blocks_exclude_each_other() -> None:
    haste = "objectives.h={name: haste_attention, teacher: dino, blocks: [2]}"
    overrides = [haste, "teachers.dino.feature=attention:0", "eval.teacher=null"]
    load_run("tiny", overrides)
    with pytest.raises(UserError, match=r"objectives\.h: queries and keys of compiled blocks"):
        load_run("tiny", [*overrides, "model.compile=blocks"])


@pytest.mark.filterwarnings("default")  # inductor warns inside itself
@pytest.mark.slow  # inductor builds C++: half a minute
def test_inductors_code_gives_the_numbers_of_eager_blocks(
    wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_blocks, "BACKEND", "inductor")
    plain, found = (trained(load(wan_folder, compiled=c), COUNTS, BLOCKS) for c in (False, True))
    for mine, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    assert graphs() == 1
