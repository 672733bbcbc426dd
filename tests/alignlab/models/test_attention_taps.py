"""Taps of queries and keys: the maps that a transformer uses, and nothing that changes for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from alignlab.config.model import LoraConfig
from alignlab.errors import UserError
from alignlab.losses.haste_attention import attention_alignment_loss
from alignlab.losses.objective import Tokens
from alignlab.models import attention as alignlab_attention
from alignlab.models.reference_branch import Output, ReferenceBranch
from alignlab.models.taps import Kind, Taps
from alignlab.models.wan import load_wan
from random_tensors import draw

KINDS: dict[int, set[Kind]] = {1: {"attention", "video"}, 3: {"attention"}}
GRID = (2, 2, 3)


def load(folder: Path, **settings: Any) -> WanTransformer3DModel:
    return load_wan(str(folder), **settings).transformer


def small_wan(of: Any = WanTransformer3DModel, **settings: Any) -> Any:
    small: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 8,
        "ffn_dim": 16,
        "num_layers": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return of(**small, **settings)


def batch() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Two videos of 2x2x3 tokens, the first with two references."""
    references = [draw(k, 16, 4, 6, seed=3 + k) for k in (2, 0)]
    latents = draw(2, 16, 2, 4, 6)
    return latents, torch.tensor([300.0, 800.0]), draw(2, 16, 32, seed=1), references


def run(model: Any, *, tapped: bool = True) -> Output:
    taps = Taps(model, list(KINDS) if tapped else [], list(KINDS) if tapped else [])
    with ReferenceBranch(model, taps=taps, kinds=KINDS) as branch:
        return branch(*batch())


Used = tuple[Tensor, Tensor, Tensor, Tensor]


@contextmanager
def used_attention() -> Iterator[list[Used]]:
    """Queries, keys, values and results of every attention inside, (B, N, H, E)."""
    found: list[Used] = []

    def noted(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = dispatch_attention_fn(query, key, value, *args, **kwargs)
        found.append((query, key, value, out))
        return out

    with pytest.MonkeyPatch.context() as patch:
        for module in (alignlab_attention, transformer_wan):
            patch.setattr(module, "dispatch_attention_fn", noted)
        yield found


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, N, N) of queries and keys (B, N, H, E)."""
    query, key = query.movedim(2, 1), key.movedim(2, 1)
    maps: Tensor = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return maps


def same_frame(maps_HNN: Tensor) -> Tensor:
    """Rows of the video's tokens, columns of their own frame made to sum to 1, (T, H, P, P)."""
    count = GRID[1] * GRID[2]
    blocks = [
        maps_HNN[:, start : start + count, start : start + count]
        for start in range(0, GRID[0] * count, count)
    ]
    maps = torch.stack(blocks)
    return maps / maps.sum(-1, keepdim=True)


def tapped_maps(tokens: Tokens) -> Tensor:
    """(B, T, H, P, P)."""
    assert tokens.heads is not None
    frames = tokens.tokens_BND.unflatten(1, (tokens.grid[0], -1))
    query, key = frames.unflatten(-1, (2, tokens.heads, -1)).unbind(3)
    maps = [probabilities(*pair) for pair in zip(query, key, strict=True)]
    return torch.stack(maps)


def test_a_map_is_the_attention_that_the_block_uses_within_a_frame(wan_folder: Path) -> None:
    """With references in the sequence of one sample; of the blocks' self-attention alone."""
    model = load(wan_folder)
    with used_attention() as used, torch.no_grad():
        out = run(model)
    # samples with no extra frames go first; a block attends to itself, then to the text
    per_sample = dict(zip((1, 0), (used[0::2][:4], used[0::2][4:]), strict=True))
    for block in KINDS:
        tokens = out.taps[block].of("attention")
        assert (tokens.grid, tokens.heads, tokens.subject_ids_BN) == (GRID, 2, None)
        assert tokens.tokens_BND.shape == (2, 12, 2 * 48)
        for sample, maps in enumerate(tapped_maps(tokens)):
            query, key, value, result = per_sample[sample][block]
            assert query.shape[1] == (24 if sample == 0 else 12)
            whole = probabilities(query, key)
            torch.testing.assert_close((whole @ value.movedim(2, 1)).movedim(1, 2), result)
            torch.testing.assert_close(maps, same_frame(whole[0]))
    assert out.taps[1].kept_video is not None and out.taps[3].kept_video is None


def test_a_processor_of_diffusers_and_vace_give_the_maps_that_they_use() -> None:
    """As in a loop of one's own, in which attention is not alignlab's."""
    plain = small_wan()
    vace = small_wan(WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=96)
    inputs = (draw(1, 4, 2, 4, 6), torch.tensor([500.0]), draw(1, 3, 8))
    given: dict[str, Any] = {"control_hidden_states": draw(1, 96, 2, 4, 6)}
    for model, more in ((plain, {}), (vace, given)):
        taps = Taps(model, [0, 1], [1])
        with used_attention() as used, torch.no_grad(), taps, taps.recording() as recorded:
            model(*inputs, **more)
        (placed,) = recorded.attention[1]
        query, key = placed.unbind(2)
        assert any(torch.equal(query, one) and torch.equal(key, other) for one, other, *_ in used)
        assert list(recorded.attention) == [1] and len(recorded.outputs[0]) == 1


def test_tapping_attention_changes_no_bit_and_leaves_no_hook(wan_folder: Path) -> None:
    model = load(wan_folder)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    plain, tapped = run(model, tapped=False), run(model)
    assert torch.equal(plain.velocity_BCTHW, tapped.velocity_BCTHW)
    gradients = []
    for out in (plain, tapped):
        model.zero_grad()
        out.velocity_BCTHW.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is other is None or (one is not None and torch.equal(one, other))
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def loss_of(out: Output) -> Tensor:
    losses = []
    for block in KINDS:
        tokens = out.taps[block].of("attention")
        teacher = draw(2, 2, 1, 6, 2 * 2 * 5, seed=9 + block)
        losses.append(
            attention_alignment_loss(
                tokens.tokens_BND.unflatten(1, (2, 6)), teacher, student_heads=2, teacher_heads=2
            ).mean()
        )
    return torch.stack(losses).sum() + out.velocity_BCTHW.square().mean()


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_checkpointing_gives_the_same_maps_and_gradients_of_them(
    wan_folder: Path, lora: LoraConfig | None
) -> None:
    train = "full" if lora is None else "lora"
    found = []
    for checkpointing in (False, True):
        model = load(wan_folder, train=train, lora=lora, gradient_checkpointing=checkpointing)
        taps = Taps(model, list(KINDS), list(KINDS))
        with ReferenceBranch(model, taps=taps, kinds=KINDS) as branch:
            out = branch(*batch())
            loss_of(out).backward()
        maps = [out.taps[block].of("attention").tokens_BND for block in KINDS]
        found.append((maps, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (plain, plain_grads), (recomputed, recomputed_grads) = found
    assert all(torch.equal(*pair) for pair in zip(plain, recomputed, strict=True))
    assert any(g is not None and g.abs().sum() > 0 for g in plain_grads.values())
    for name, gradient in plain_grads.items():
        torch.testing.assert_close(recomputed_grads[name], gradient, msg=name)


def test_the_gradient_of_a_map_reaches_its_queries_and_keys_and_what_is_before(
    wan_folder: Path,
) -> None:
    model = load(wan_folder, gradient_checkpointing=True)
    taps = Taps(model, [1], [1])
    with ReferenceBranch(model, taps=taps, kinds={1: {"attention"}}) as branch:
        out = branch(*batch())
        out.taps[1].of("attention").tokens_BND.square().sum().backward()
    gradient = {n: p.grad for n, p in model.named_parameters()}
    for name in ("blocks.1.attn1.to_q", "blocks.1.attn1.norm_k", "blocks.0.ffn.net.2"):
        found = gradient[f"{name}.weight"]
        assert found is not None and found.abs().sum() > 0, name
    for name in ("blocks.1.attn1.to_v", "blocks.1.ffn.net.2", "blocks.2.attn1.to_q"):
        found = gradient[f"{name}.weight"]
        assert found is None or not found.any(), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_compiled_one_by_one_show_their_attention_or_say_what_is_needed() -> None:
    """They share compiled code, whose hooks torch looks at if it is told to."""
    torch._dynamo.reset()
    inputs = (draw(1, 4, 2, 4, 6), torch.tensor([500.0]), draw(1, 3, 8))
    model = small_wan()
    taps = Taps(model, [1], [1])
    with taps, taps.recording() as plain:
        model(*inputs)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    expected = (
        r"^transformer: queries and keys of blocks\.1\.attn1 were not seen: .*_guards = False"
    )
    with pytest.raises(UserError, match=expected), taps, taps.recording():
        model(*inputs)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False), taps:
        for _ in range(2):
            with taps.recording() as recorded:
                model(*inputs)
            (found,), (placed,) = recorded.attention[1], plain.attention[1]
            torch.testing.assert_close(found, placed)
    found.square().mean().backward()
    assert model.blocks[0].ffn.net[2].weight.grad is not None
    torch._dynamo.reset()


def test_an_attention_that_leaves_the_norms_out_is_refused(wan_folder: Path) -> None:
    model = load(wan_folder)

    def foreign(attention: Any, hidden_states: Tensor, *args: Any) -> Tensor:
        return hidden_states

    model.blocks[1].attn1.processor = foreign
    taps = Taps(model, [1], [1])
    latents, timesteps, text, _ = batch()
    expected = (
        r"^transformer: queries and keys of blocks\.1\.attn1 were not seen: its processor must"
    )
    with pytest.raises(UserError, match=expected), taps, taps.recording(), torch.no_grad():
        model(latents, timesteps, text)
