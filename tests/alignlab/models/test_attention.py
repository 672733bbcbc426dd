"""Wan's attention as alignlab runs it: diffusers' numbers, and one dtype for every backend."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from alignlab.config.model import LoraConfig
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.models.attention import SameDtypeAttention
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.wan import load_wan
from alignlab.train import train
from attention_tools import STOOD_IN, StrictAttention, replace_backend, run_norms_as_cuda

# torch says once that bf16 autocast over fp32 weights cannot fuse the norm
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
HEADS, HEAD_DIM = 2, 24  # of the fixture's transformer


def _batch(*counts: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(len(counts), 16, 3, 4, 6, generator=draw),
        torch.rand(len(counts), generator=draw) * 1000,
        torch.randn(len(counts), 16, 32, generator=draw),
        [torch.randn(k, 16, 4, 6, generator=draw) for k in counts],
    )


def _bf16(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def _gradients(model: WanTransformer3DModel, velocity: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    velocity.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["cpu", "cuda"])
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Autocast as on a CPU, and its policy of CUDA emulated."""
    if request.param == "cuda":
        run_norms_as_cuda(monkeypatch)
    return str(request.param)


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_outputs_and_gradients_are_those_of_diffusers_bit_for_bit(
    bf16: bool, train: Any, wan_folder: Path
) -> None:
    model = load_wan(
        str(wan_folder),
        train=train,
        lora=LoraConfig(rank=2) if train == "lora" else None,
        precision="bf16" if bf16 else "fp32",
    ).transformer
    latents, timesteps, text, references = _batch(2, 2)
    dtype = model.patch_embedding.weight.dtype
    frames = torch.cat([latents, torch.stack(references).transpose(1, 2)], dim=2)
    with _bf16(bf16):
        plain = model(frames.to(dtype), timesteps, text.to(dtype), return_dict=False)[0]
    expected = _gradients(model, plain[:, :, :3].float())
    with ReferenceBranch(model, text_to_references=True) as branch, _bf16(bf16):
        velocity = branch(latents, timesteps, text, references).velocity_BCTHW
        assert isinstance(model.blocks[0].attn1.processor, SameDtypeAttention)
    assert torch.equal(velocity, plain[:, :, :3].float())
    gradients = _gradients(model, velocity)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("text_to_references", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_backend_gets_one_dtype_in_bf16(
    train: Any,
    checkpointing: bool,
    text_to_references: bool,
    wan_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strict = StrictAttention(half=True)
    replace_backend(monkeypatch, strict)
    model = load_wan(
        str(wan_folder),
        train=train,
        lora=LoraConfig(rank=2) if train == "lora" else None,
        attention=STOOD_IN,
        gradient_checkpointing=checkpointing,
        precision="bf16",
    ).transformer
    strict.dtypes.clear()
    strict.lengths.clear()
    with ReferenceBranch(model, text_to_references=text_to_references) as branch:
        with _bf16():
            velocity = branch(*_batch(0, 2)).velocity_BCTHW
        gradients = _gradients(model, velocity)
    assert strict.dtypes == {torch.bfloat16}
    with_references = 18 + 2 * 6
    assert strict.lengths == {
        (18, 18),
        (18, 16),
        (with_references, with_references),
        (with_references if text_to_references else 18, 16),
    }
    assert all(weight.isfinite().all() for weight in gradients.values())


def test_without_the_cast_cudas_policy_mixes_dtypes(
    wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_norms_as_cuda(monkeypatch)
    model = load_wan(str(wan_folder), attention=STOOD_IN, precision="bf16").transformer
    replace_backend(monkeypatch, StrictAttention())
    monkeypatch.setattr(SameDtypeAttention, "__call__", WanAttnProcessor.__call__)
    with ReferenceBranch(model) as branch, _bf16(), pytest.raises(ValueError, match="mixed dtypes"):
        branch(*_batch(1))


def test_a_run_in_bf16_trains_samples_and_gives_wan_alone_the_backend(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_norms_as_cuda(monkeypatch)
    strict = StrictAttention(half=True)
    replace_backend(monkeypatch, strict)
    config = make_config(
        f"model.attention={STOOD_IN}", "model.precision=bf16", "steps=1", "eval.sample_clips=1"
    )
    strict.heads.clear()
    train(config)
    assert strict.dtypes == {torch.bfloat16}
    # neither the teacher's (12 wide) nor the autoencoder's
    assert strict.heads == {(HEADS, HEAD_DIM)}


def test_a_run_leaves_diffusers_own_backend_as_it_was(wan_folder: Path) -> None:
    load_wan(str(wan_folder))
    before = _AttentionBackendRegistry.get_active_backend()
    with pytest.raises(UserError):
        load_wan(str(wan_folder), attention="_native_cudnn")
    assert _AttentionBackendRegistry.get_active_backend() == before


def test_a_transformer_that_attends_to_an_image_is_refused() -> None:
    model = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        ffn_dim=8,
        num_layers=1,
        image_dim=8,
        added_kv_proj_dim=12,
    )
    with pytest.raises(UserError, match="image-to-video"):
        ReferenceBranch(model)
