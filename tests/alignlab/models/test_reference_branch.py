"""References beside the video: layout, text bypass, and samples that never touch each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from alignlab.errors import UserError
from alignlab.models.reference_branch import Output, ReferenceBranch
from alignlab.models.wan import load_wan

FRAMES, SIZE, TEXT = 3, (4, 6), 16
COUNTS = (2, 0, 3, 1, 0, 2)


@pytest.fixture(scope="module")
def transformer(wan_folder: Path) -> WanTransformer3DModel:
    return load_wan(str(wan_folder)).transformer


def _batch(counts: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    size = len(counts)
    return (
        torch.randn(size, 16, FRAMES, *SIZE, generator=rng),
        torch.rand(size, generator=rng) * 1000,
        torch.randn(size, TEXT, 32, generator=rng),
        [torch.randn(k, 16, *SIZE, generator=rng) for k in counts],
    )


@torch.no_grad()
def _plain(model: Any, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    out: Tensor = model(
        hidden_states=latents, timestep=timesteps, encoder_hidden_states=text, return_dict=False
    )[0]
    return out


@torch.no_grad()
def _run(transformer: WanTransformer3DModel, batch: Any, **settings: Any) -> Output:
    with ReferenceBranch(transformer, **settings) as branch:
        return branch(*batch)


@pytest.mark.parametrize("text_to_references", [False, True])
def test_without_references_it_is_the_plain_transformer_bit_for_bit(
    transformer: WanTransformer3DModel, text_to_references: bool
) -> None:
    latents, timesteps, text, references = _batch((0, 0))
    out = _run(
        transformer,
        (latents, timesteps, text, references),
        text_to_references=text_to_references,
    )
    assert torch.equal(out.velocity_BCTHW, _plain(transformer, latents, timesteps, text))


@pytest.mark.parametrize("text_to_references", [False, True])
def test_a_sample_has_the_result_it_has_alone(
    transformer: WanTransformer3DModel, text_to_references: bool
) -> None:
    batch = _batch(COUNTS)
    settings = {"text_to_references": text_to_references, "blocks": (0, 3)}
    together = _run(transformer, batch, **settings)
    for i, count in enumerate(COUNTS):
        alone = _run(transformer, [part[i : i + 1] for part in batch], **settings)
        torch.testing.assert_close(
            together.velocity_BCTHW[i], alone.velocity_BCTHW[0], rtol=1e-5, atol=1e-5
        )
        tokens = count * 6
        for block in (0, 3):
            torch.testing.assert_close(
                together.taps[block].reference.tokens_BND[i, :tokens],
                alone.taps[block].reference.tokens_BND[0],
                rtol=1e-5,
                atol=1e-5,
            )


def test_the_order_of_samples_does_not_matter(transformer: WanTransformer3DModel) -> None:
    batch = _batch(COUNTS)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = (*(part[order] for part in batch[:3]), [batch[3][i] for i in order])
    straight = _run(transformer, batch).velocity_BCTHW
    torch.testing.assert_close(
        _run(transformer, shuffled).velocity_BCTHW, straight[order], rtol=1e-5, atol=1e-5
    )


def test_references_are_frames_appended_on_the_time_axis(
    transformer: WanTransformer3DModel,
) -> None:
    latents, timesteps, text, references = _batch((2, 2))
    frames = torch.cat([latents, torch.stack(references).transpose(1, 2)], dim=2)
    expected = _plain(transformer, frames, timesteps, text)[:, :, :FRAMES]
    out = _run(transformer, (latents, timesteps, text, references), text_to_references=True)
    assert torch.equal(out.velocity_BCTHW, expected)


def test_the_text_bypass_is_cross_attention_with_zeros_for_references(
    transformer: WanTransformer3DModel,
) -> None:
    batch = _batch((2, 2))
    latents, timesteps, text, references = batch
    out = _run(transformer, batch, text_to_references=False, blocks=(3,))
    num_video = FRAMES * 2 * 3
    outputs: list[Tensor] = []

    def mask(module: Any, inputs: Any, output: Tensor) -> Tensor:
        keep = torch.arange(output.shape[1]) < num_video
        return output * keep[None, :, None]

    handles = [block.attn2.register_forward_hook(mask) for block in transformer.blocks]
    handles.append(
        transformer.blocks[3].register_forward_hook(lambda m, i, output: outputs.append(output))
    )
    frames = torch.cat([latents, torch.stack(references).transpose(1, 2)], dim=2)
    expected = _plain(transformer, frames, timesteps, text)[:, :, :FRAMES]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(out.velocity_BCTHW, expected, rtol=1e-5, atol=1e-5)
    tapped = out.taps[3].reference.tokens_BND
    torch.testing.assert_close(tapped, outputs[0][:, num_video:], rtol=1e-5, atol=1e-5)
    with_text = _run(transformer, batch, text_to_references=True)
    assert (out.velocity_BCTHW - with_text.velocity_BCTHW).abs().max() > 1e-3


def test_the_bypassed_tokens_cost_no_cross_attention(transformer: WanTransformer3DModel) -> None:
    queries: list[int] = []
    handle = transformer.blocks[0].attn2.to_q.register_forward_hook(
        lambda module, inputs, output: queries.append(output.shape[1])
    )
    _run(transformer, _batch((3,)), text_to_references=False)
    _run(transformer, _batch((3,)), text_to_references=True)
    handle.remove()
    assert queries == [18, 18 + 3 * 6]


@pytest.mark.parametrize("text_to_references", [False, True])
def test_reference_tokens_of_block_0_see_the_text_only_when_asked(
    transformer: WanTransformer3DModel, text_to_references: bool
) -> None:
    latents, timesteps, text, references = _batch((2,))
    settings = {"text_to_references": text_to_references, "blocks": (0, 1)}
    first = _run(transformer, (latents, timesteps, text, references), **settings).taps
    other = _run(transformer, (latents, timesteps, text + 1.0, references), **settings).taps
    same = torch.equal(first[0].reference.tokens_BND, other[0].reference.tokens_BND)
    assert same != text_to_references
    assert not torch.equal(first[0].video.tokens_BND, other[0].video.tokens_BND)
    # one block later the text has reached them through the video tokens
    assert not torch.equal(first[1].reference.tokens_BND, other[1].reference.tokens_BND)


def test_references_change_the_video(transformer: WanTransformer3DModel) -> None:
    latents, timesteps, text, references = _batch((2,))
    out = _run(transformer, (latents, timesteps, text, references)).velocity_BCTHW
    swapped = _run(transformer, (latents, timesteps, text, [references[0] * 2])).velocity_BCTHW
    assert (out - swapped).abs().max() > 1e-3


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.usefixtures("process_group")
def test_every_sample_runs_alone_where_forward_calls_must_keep_step(wan_folder: Path) -> None:
    transformer = load_wan(str(wan_folder)).transformer
    batch = _batch(COUNTS)
    together = _run(transformer, batch).velocity_BCTHW
    calls: list[int] = []
    handle = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with ReferenceBranch(fully_shard(transformer)) as branch:
        alone = branch(*batch).velocity_BCTHW
    handle.remove()
    assert calls == [1] * len(COUNTS)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_the_transformer_is_left_as_it_was(transformer: WanTransformer3DModel) -> None:
    before = dict(transformer.attn_processors)
    keys = list(transformer.state_dict())
    batch = _batch((1,))
    plain = _plain(transformer, *batch[:3])
    with ReferenceBranch(transformer) as branch:
        branch(*batch)
        assert list(transformer.state_dict()) == keys
    with pytest.raises(KeyError), ReferenceBranch(transformer):
        raise KeyError
    assert transformer.attn_processors == before
    assert torch.equal(_plain(transformer, *batch[:3]), plain)
    with pytest.raises(RuntimeError, match="with-block"):
        branch(*batch)


def test_the_attention_backend_stays_the_chosen_one(wan_folder: Path) -> None:
    model = load_wan(str(wan_folder), attention="_native_math").transformer
    with ReferenceBranch(model):
        backends = {p._attention_backend.value for p in model.attn_processors.values()}
    assert backends == {"_native_math"}


def test_gradient_checkpointing_gives_the_same_gradients(wan_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_wan(str(wan_folder), gradient_checkpointing=checkpointing).transformer
        with ReferenceBranch(model) as branch:
            out = branch(*_batch(COUNTS))
            out.velocity_BCTHW.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_recomputing_with_another_video_size_raises(wan_folder: Path) -> None:
    model = load_wan(str(wan_folder), gradient_checkpointing=True).transformer
    with ReferenceBranch(model) as branch:
        latents, timesteps, text, references = _batch((1,))
        out = branch(latents, timesteps, text, references)
        branch(latents[:, :, :2], timesteps, text, references)
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            out.velocity_BCTHW.sum().backward()


def test_a_bf16_transformer_takes_fp32_inputs(wan_folder: Path) -> None:
    model = load_wan(str(wan_folder)).transformer
    batch = _batch((1, 2))
    expected = _run(model, batch).velocity_BCTHW
    out = _run(model.to(torch.bfloat16), batch).velocity_BCTHW
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)


def test_shapes_that_do_not_fit_are_refused(transformer: WanTransformer3DModel) -> None:
    latents, timesteps, text, references = _batch((1, 1))
    wrong_size = [references[0], references[1][:, :, :2]]
    for bad in (
        (latents, timesteps, text, wrong_size),
        (latents, timesteps, text, references[:1]),
        (latents[..., :5], timesteps, text, [r[..., :5] for r in references]),
        (latents, timesteps, text, [r.expand(30, -1, -1, -1) for r in references]),
    ):
        with pytest.raises(ValueError), ReferenceBranch(transformer) as branch:
            branch(*bad)


def test_patches_over_several_frames_are_refused() -> None:
    model = WanTransformer3DModel(
        patch_size=(2, 2, 2), num_attention_heads=1, attention_head_dim=12, ffn_dim=8, num_layers=1
    )
    with pytest.raises(UserError, match="several frames"):
        ReferenceBranch(model)


@pytest.mark.parametrize("text_to_references", [False, True])
def test_zero_stands_in_one_frame_for_references_that_are_absent(
    transformer: WanTransformer3DModel, text_to_references: bool
) -> None:
    latents, timesteps, text, references = _batch(COUNTS)
    settings = {"text_to_references": text_to_references, "blocks": (0, 3)}
    out = _run(transformer, (latents, timesteps, text, references), **settings)
    zero = _run(
        transformer, (latents, timesteps, text, references), absent_references="zero", **settings
    )
    padded = [r if len(r) else torch.zeros(1, *r.shape[1:]) for r in references]
    by_hand = _run(transformer, (latents, timesteps, text, padded), **settings)
    torch.testing.assert_close(zero.velocity_BCTHW, by_hand.velocity_BCTHW, rtol=1e-5, atol=1e-5)
    for i, count in enumerate(COUNTS):
        change = (zero.velocity_BCTHW[i] - out.velocity_BCTHW[i]).abs().max()
        assert (change > 1e-3) == (count == 0)
    # no tokens of zeros: whatever reads the taps finds those of real references alone
    for block in (0, 3):
        taps, without = zero.taps[block].reference, out.taps[block].reference
        assert taps.grid == without.grid
        assert taps.subject_ids_BN is not None and without.subject_ids_BN is not None
        assert torch.equal(taps.subject_ids_BN, without.subject_ids_BN)
        torch.testing.assert_close(taps.tokens_BND, without.tokens_BND, rtol=1e-5, atol=1e-5)


def test_zero_gives_no_reference_tokens_to_a_batch_without_references(
    transformer: WanTransformer3DModel,
) -> None:
    out = _run(transformer, _batch((0, 0)), absent_references="zero", blocks=(1,))
    assert out.taps[1].reference.grid == (0, 2, 3)
    assert out.taps[1].reference.tokens_BND.shape[1] == 0
    assert out.taps[1].video.tokens_BND.shape[1] == FRAMES * 6


def test_the_frame_of_zeros_must_fit_the_position_table(
    transformer: WanTransformer3DModel,
) -> None:
    latents = torch.zeros(1, 16, 32, *SIZE)
    batch = (latents, torch.ones(1), torch.zeros(1, TEXT, 32), [torch.zeros(0, 16, *SIZE)])
    _run(transformer, batch)
    with pytest.raises(ValueError, match="33 positions"):
        _run(transformer, batch, absent_references="zero")
