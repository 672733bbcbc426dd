"""Taps: what they catch, what they leave alone, and the gradients that flow through them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from torch import Tensor

from alignlab.config.model import LoraConfig
from alignlab.errors import UserError
from alignlab.models.reference_branch import Output, ReferenceBranch
from alignlab.models.taps import Kind, Taps, block_tokens, find_wan
from alignlab.models.wan import load_wan

COUNTS = (2, 0, 3)
BLOCKS = (1, 3)


def _batch() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, 16, 2, 4, 6, generator=rng),
        torch.rand(3, generator=rng) * 1000,
        torch.randn(3, 16, 32, generator=rng),
        [torch.randn(k, 16, 4, 6, generator=rng) for k in COUNTS],
    )


def _load(folder: Path, **settings: Any) -> WanTransformer3DModel:
    return load_wan(str(folder), **settings).transformer


def _run(model: torch.nn.Module, blocks: tuple[int, ...] = BLOCKS, **settings: Any) -> Output:
    with ReferenceBranch(model, blocks=blocks, **settings) as branch:
        return branch(*_batch())


def _loss(out: Output) -> Tensor:
    terms = [
        tokens.tokens_BND.square().mean()
        for tap in out.taps.values()
        for tokens in (tap.video, tap.reference)
    ]
    return torch.stack(terms).sum() + out.velocity_BCTHW.square().mean()


def _hooks(model: WanTransformer3DModel) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_a_tap_is_the_output_of_its_block(wan_folder: Path) -> None:
    model = _load(wan_folder)
    latents, timesteps, text, references = _batch()
    outputs: list[Tensor] = []
    handle = model.blocks[1].register_forward_hook(lambda m, i, out: outputs.append(out))
    with ReferenceBranch(model, blocks=(1,)) as branch:
        tap = branch(latents[2:], timesteps[2:], text[2:], references[2:]).taps[1]
    handle.remove()
    tokens = torch.cat([tap.video.tokens_BND, tap.reference.tokens_BND], dim=1)
    assert torch.equal(tokens, outputs[0])
    assert (tap.video.grid, tap.reference.grid) == ((2, 2, 3), (3, 2, 3))


def test_subject_ids_count_references_and_mark_the_padding(wan_folder: Path) -> None:
    out = _run(_load(wan_folder))
    assert list(out.taps) == list(BLOCKS)
    for tap in out.taps.values():
        assert tap.video.subject_ids_BN is None
        ids = tap.reference.subject_ids_BN
        assert ids is not None and ids.dtype == torch.int64
        assert ids.tolist() == [
            [0] * 6 + [1] * 6 + [-1] * 6,
            [-1] * 18,
            [0] * 6 + [1] * 6 + [2] * 6,
        ]
        assert tap.reference.tokens_BND[ids == -1].abs().max() == 0
        assert tap.reference.tokens_BND[ids >= 0].abs().min() > 0


def test_a_batch_without_references_has_no_reference_tokens(wan_folder: Path) -> None:
    latents, timesteps, text, _ = _batch()
    none = [torch.empty(0, 16, 4, 6)] * 3
    with ReferenceBranch(_load(wan_folder), blocks=(0,)) as branch:
        tap = branch(latents, timesteps, text, none).taps[0]
    assert tap.reference.grid == (0, 2, 3)
    assert tap.reference.tokens_BND.shape == (3, 0, 48)
    assert tap.reference.subject_ids_BN is not None
    assert tap.reference.subject_ids_BN.shape == (3, 0)


def test_tapping_changes_nothing(wan_folder: Path) -> None:
    model = _load(wan_folder)
    plain, tapped = _run(model, blocks=()), _run(model)
    assert plain.taps == {}
    assert torch.equal(plain.velocity_BCTHW, tapped.velocity_BCTHW)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_checkpointing_gives_the_same_features_and_gradients(
    wan_folder: Path, lora: LoraConfig | None
) -> None:
    train = "full" if lora is None else "lora"
    found: list[tuple[Output, dict[str, Tensor | None]]] = []
    for checkpointing in (False, True):
        model = _load(wan_folder, train=train, lora=lora, gradient_checkpointing=checkpointing)
        with ReferenceBranch(model, blocks=BLOCKS) as branch:
            out = branch(*_batch())
            before = {b: t.reference.tokens_BND.detach().clone() for b, t in out.taps.items()}
            _loss(out).backward()
            for block, tokens in before.items():
                assert torch.equal(out.taps[block].reference.tokens_BND, tokens)
            assert branch._taps._record is None
        found.append((out, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (plain, plain_grads), (recomputed, recomputed_grads) = found
    for block in BLOCKS:
        assert torch.equal(
            plain.taps[block].reference.tokens_BND, recomputed.taps[block].reference.tokens_BND
        )
        assert torch.equal(
            plain.taps[block].video.tokens_BND, recomputed.taps[block].video.tokens_BND
        )
    for name, gradient in plain_grads.items():
        torch.testing.assert_close(recomputed_grads[name], gradient, msg=name)


def test_the_tapped_gradient_reaches_the_blocks_before_it_and_no_other(wan_folder: Path) -> None:
    model = _load(wan_folder, gradient_checkpointing=True)
    with ReferenceBranch(model, blocks=(1,)) as branch:
        branch(*_batch()).taps[1].reference.tokens_BND.square().sum().backward()
    gradient = {n: p.grad for n, p in model.named_parameters()}
    for block in (0, 1):
        assert gradient[f"blocks.{block}.ffn.net.2.weight"].abs().sum() > 0
    for block in (2, 3):
        assert gradient[f"blocks.{block}.ffn.net.2.weight"] is None
    assert gradient["patch_embedding.weight"].abs().sum() > 0


def test_lora_starts_with_the_features_of_the_base(wan_folder: Path) -> None:
    base = _run(_load(wan_folder))
    adapted = _load(wan_folder, train="lora", lora=LoraConfig(rank=2))
    out = _run(adapted)
    for block in BLOCKS:
        assert torch.equal(
            out.taps[block].reference.tokens_BND, base.taps[block].reference.tokens_BND
        )
    _loss(out).backward()
    trained = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained)


def test_evaluation_keeps_no_graph_and_can_leave_the_taps_out(wan_folder: Path) -> None:
    model = _load(wan_folder)
    with ReferenceBranch(model, blocks=BLOCKS) as branch, torch.no_grad():
        tap = branch(*_batch()).taps[1]
        assert not tap.video.tokens_BND.requires_grad
        assert branch(*_batch(), capture=False).taps == {}


def test_hooks_are_gone_after_exit_and_after_an_error(wan_folder: Path) -> None:
    model = _load(wan_folder)
    before = _hooks(model)
    with Taps(model, BLOCKS):
        assert _hooks(model) == before + len(BLOCKS)
    assert _hooks(model) == before
    with pytest.raises(KeyError), Taps(model, BLOCKS) as taps, taps.recording():
        raise KeyError
    assert _hooks(model) == before
    assert taps._record is None


def test_a_failed_forward_pass_leaves_no_half_capture(wan_folder: Path) -> None:
    model = _load(wan_folder)
    latents, timesteps, text, references = _batch()
    with ReferenceBranch(model, blocks=BLOCKS) as branch:
        with pytest.raises(RuntimeError):
            branch(latents, timesteps, text[..., :7], references)
        out = branch(latents, timesteps, text, references)
    assert torch.equal(out.velocity_BCTHW, _run(model).velocity_BCTHW)


@pytest.mark.parametrize("block", [4, -1])
def test_a_block_that_does_not_exist_is_refused(wan_folder: Path, block: int) -> None:
    with pytest.raises(UserError, match=f"block {block} does not exist: this transformer"):
        ReferenceBranch(_load(wan_folder), blocks=(0, block))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("whole_model", [True, False])
def test_taps_work_in_a_compiled_transformer(wan_folder: Path, whole_model: bool) -> None:
    torch._dynamo.reset()
    model = _load(wan_folder)
    latents, timesteps, text, references = _batch()
    batches = [(x[:1], timesteps[:1], text[:1], references[:1]) for x in (latents, -latents)]
    with ReferenceBranch(model, blocks=BLOCKS) as branch:
        expected = [branch(*batch) for batch in batches]
    compiled: Any = model
    if whole_model:
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with ReferenceBranch(compiled, blocks=BLOCKS) as branch:
        for batch, plain in zip(batches, expected, strict=True):
            out = branch(*batch)
            torch.testing.assert_close(out.velocity_BCTHW, plain.velocity_BCTHW)
            for block in BLOCKS:
                torch.testing.assert_close(
                    out.taps[block].reference.tokens_BND, plain.taps[block].reference.tokens_BND
                )
        _loss(out).backward()
    assert model.blocks[0].ffn.net[2].weight.grad is not None
    torch._dynamo.reset()


def test_the_transformer_is_found_in_what_is_wrapped_around_it(wan_folder: Path) -> None:
    model = _load(wan_folder)
    lora = PeftLora(r=2, target_modules=["to_q"])
    compiled: Any = torch.compile(model, backend="eager")
    for wrapped in (model, compiled, torch.nn.ModuleList([model]), get_peft_model(model, lora)):
        assert find_wan(wrapped) is model
    with pytest.raises(UserError, match=r"^transformer: ModuleList holds 2 models"):
        find_wan(torch.nn.ModuleList([model, _load(wan_folder)]))
    with pytest.raises(UserError, match=r"^transformer: its patches .* span several latent"):
        find_wan(_over_frames())


def _over_frames() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(2, 2, 2), num_attention_heads=1, attention_head_dim=12, ffn_dim=8, num_layers=1
    )


def test_block_tokens_pads_each_sample_to_the_longest() -> None:
    samples = [torch.arange(n * 2.0).view(n, 2) for n in (4, 8, 6)]
    found = block_tokens({5: samples}, (2, 1, 2))[5]
    assert found.video.tokens_BND.shape == (3, 4, 2)
    assert found.reference.grid == (2, 1, 2)
    for ids_BN in (found.reference.subject_ids_BN, found.reference.host_ids_BN):
        assert ids_BN is not None
        assert ids_BN.tolist() == [[-1] * 4, [0, 0, 1, 1], [0, 0, -1, -1]]


def test_taps_keep_only_the_tokens_that_are_read(wan_folder: Path) -> None:
    kinds: dict[int, set[Kind]] = {1: {"reference"}, 3: {"video"}}
    model = _load(wan_folder)
    with ReferenceBranch(model, blocks=(1, 3)) as branch, torch.no_grad():
        all_kept = branch(*_batch()).taps
    with ReferenceBranch(model, blocks=(1, 3), kinds=kinds) as branch, torch.no_grad():
        taps = branch(*_batch()).taps
    assert torch.equal(taps[1].reference.tokens_BND, all_kept[1].reference.tokens_BND)
    assert torch.equal(taps[3].video.tokens_BND, all_kept[3].video.tokens_BND)
    assert taps[1].kept_video is None and taps[3].kept_reference is None
    with pytest.raises(ValueError, match="the video tokens of this block were not to be kept"):
        taps[1].of("video")
