"""Attention backends are tried in a Wan block, and a recipe that names one gets a usable answer."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.models import attention_backends
from alignlab.models.attention import SameDtypeAttention
from alignlab.models.attention_backends import (
    BackendProbe,
    BackendState,
    Precision,
    available_backends,
    backend_names,
    check_backend,
)
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.wan import load_wan
from alignlab.train import train
from attention_tools import STOOD_IN, StrictAttention, attend, replace_backend, run_norms_as_cuda

# torch says once that bf16 autocast over fp32 weights cannot fuse the norm
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
States = dict[Precision, dict[str, BackendState]]


@pytest.fixture(scope="module")
def found() -> States:
    """All backends, tried once: that takes seconds, which no collection of tests should."""
    return {precision: available_backends("cpu", precision=precision) for precision in PRECISIONS}


def test_all_of_diffusers_backends_are_reported(found: States) -> None:
    every = {backend.value for backend in AttentionBackendName}
    assert set(found["fp32"]) == set(found["bf16"]) == every
    assert backend_names()[0] == "native"


def test_native_works_on_the_cpu_and_cuda_kernels_do_not(found: States) -> None:
    for states in found.values():
        assert states["native"].ability == states["_native_math"].ability == "trains"
        assert (
            states["_native_cudnn"].ability == states["_native_efficient"].ability == "needs a GPU"
        )
        assert states["flex"].ability == "inference only"  # torch has no backward for it on a CPU
        for name in ("flash", "sage", "_flash_3", "flash_hub"):
            assert states[name].ability == "missing package"


def test_every_reason_is_one_line(found: States) -> None:
    states = [state for by_name in found.values() for state in by_name.values()]
    assert all((state.ability == "trains") == (not state.reason) for state in states)
    assert not any("\n" in str(state) for state in states)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_said_to_train_trains_a_wan(
    precision: Precision, found: States, wan_folder: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 4, 4, generator=draw)
    text, references = torch.randn(1, 16, 32, generator=draw), [latents[0, :, :1].transpose(0, 1)]
    training = [name for name, state in found[precision].items() if state.ability == "trains"]
    assert {"native", "_native_math"} <= set(training)
    for name in training:
        model = load_wan(str(wan_folder), attention=name, precision=precision).transformer
        with ReferenceBranch(model) as branch:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = branch(latents, torch.tensor([500.0]), text, references)
            out.velocity_BCTHW.square().mean().backward()
        gradient = model.blocks[0].attn1.to_q.weight.grad
        assert gradient is not None and float(gradient.abs().sum()) > 0, name


def test_unknown_backend_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"model\.attention: .*'nativ', did you mean 'native'"):
        check_backend("nativ", "cpu")


def test_unusable_backend_gets_reason_and_those_that_work() -> None:
    with pytest.raises(UserError) as caught:
        check_backend("_native_cudnn", "cpu")
    message = str(caught.value)
    assert message.startswith(
        "model.attention: _native_cudnn cannot train on cpu in fp32 (needs a GPU: No viable backend"
    )
    assert message.endswith("; these can: native, _native_flash, _native_math")


@pytest.mark.parametrize("settings", [{}, {"train": "lora"}, {"gradient_checkpointing": True}])
def test_mixed_dtypes_under_the_runs_autocast_are_seen(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_norms_as_cuda(monkeypatch)
    replace_backend(monkeypatch, StrictAttention())
    bf16, fp32 = (BackendProbe("cpu", precision=p, **settings) for p in ("bf16", "fp32"))
    assert bf16.state(STOOD_IN).ability == "trains"
    monkeypatch.setattr(SameDtypeAttention, "__call__", WanAttnProcessor.__call__)
    reason = "mixed dtypes: torch.float32, torch.float32, torch.bfloat16"
    assert bf16.state(STOOD_IN).reason == reason
    assert fp32.state(STOOD_IN).ability == "trains"  # without autocast there is one


def test_a_block_is_tried_with_and_without_references_at_the_models_head_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strict = StrictAttention()
    replace_backend(monkeypatch, strict)
    check_backend(STOOD_IN, "cpu", head_dim=96)
    assert strict.heads == {(2, 96)}
    # 64 tokens of video, 32 of references, 64 of text
    assert strict.lengths == {(64, 64), (96, 96), (96, 64)}


def test_a_backend_for_half_precision_is_refused_in_fp32_and_told_of_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace_backend(monkeypatch, StrictAttention(half=True))
    check_backend(STOOD_IN, "cpu", precision="bf16")
    with pytest.raises(UserError) as caught:
        check_backend(STOOD_IN, "cpu", precision="fp32")
    assert "in fp32 (needs a GPU: only half precision)" in str(caught.value)
    assert str(caught.value).endswith(f"; with model.precision=bf16, {STOOD_IN} does")


def test_a_mistake_is_seen_before_training(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_backend(monkeypatch, StrictAttention(half=True))
    config = make_config(f"model.attention={STOOD_IN}")
    with pytest.raises(UserError, match=f"{STOOD_IN} cannot train on cpu in fp32"):
        train(config)
    assert not list(Path(config.output).rglob("metrics.jsonl"))


def detached(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value).detach()


@torch.library.custom_op("alignlab_tests::attend", mutates_args=())
def without_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value).contiguous()


def with_wrong_gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = attend(query, key, value)
    return out.detach() + 1.5 * (out - out.detach())


def scaled_wrongly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query / 8, key, value)


def without_numbers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value) * float("nan")


@pytest.mark.parametrize(
    ("function", "state"),
    [
        (detached, "inference only: it has no gradient"),
        (without_formula, "inference only: .*no autograd formula was registered"),
        (with_wrong_gradient, r"inference only: its gradient is off by \d\d%"),
        (scaled_wrongly, r"does not work: its output is off by \d\d%"),
        (without_numbers, "does not work: its output is off by nan%"),
    ],
)
def test_what_computes_something_else_is_refused(
    function: Callable[..., Tensor], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_backend(monkeypatch, function)
    assert re.match(state, str(BackendProbe("cpu", precision="bf16").state(STOOD_IN)))


def flash(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return StrictAttention(half=True)(q, k, v)


def packed(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return flash(q[None], k[None], v[None])[0]  # the groups of the probe have one sample


def sage(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return flash(q, k, v).detach()


def sage_packed(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return packed(q, k, v).detach()


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
    return StrictAttention()(q, k, v)


XOPS = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)


@pytest.mark.parametrize(
    ("name", "package", "function", "in_bf16", "in_fp32"),
    [
        ("flash", "FLASH_ATTN", ("flash_attn_func", flash), "trains", "needs a GPU"),
        ("flash_varlen", "FLASH_ATTN", ("flash_attn_varlen_func", packed), "trains", "needs a GPU"),
        ("sage", "SAGE_ATTN", ("sageattn", sage), "inference only", "needs a GPU"),
        (
            "sage_varlen",
            "SAGE_ATTN",
            ("sageattn_varlen", sage_packed),
            "inference only",
            "needs a GPU",
        ),
        ("xformers", "XFORMERS_ATTN", ("xops", XOPS), "trains", "trains"),
    ],
)
def test_backends_of_packages_get_what_they_take_under_cudas_policy(
    name: str,
    package: str,
    function: tuple[str, Any],
    in_bf16: str,
    in_fp32: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """diffusers' own way to each package, whose functions are stood in for."""
    monkeypatch.setattr(attention_dispatch, f"_CAN_USE_{package}", True)
    monkeypatch.setattr(attention_dispatch, *function)
    run_norms_as_cuda(monkeypatch)
    assert BackendProbe("cpu", precision="bf16").state(name).ability == in_bf16
    assert BackendProbe("cpu", precision="fp32").state(name).ability == in_fp32


def test_a_kernel_that_cannot_be_downloaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise HTTPError("Name or service not known")

    for module in (attention_dispatch, attention_backends):
        monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    monkeypatch.setattr(attention_dispatch, "is_kernels_version", lambda *needed: True)
    monkeypatch.setattr(attention_dispatch, "get_organization_overview", unreachable)
    monkeypatch.setattr(attention_dispatch, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=None))
    assert available_backends("cpu")["flash_hub"].ability == "not tried"
    with pytest.raises(UserError, match=r"flash_hub cannot .* work: Name or service not known"):
        check_backend("flash_hub", "cpu")


@pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None,
    reason="xformers is not installed: extra dev, which has it on x86-64 Linux",
)
def test_xformers_gets_one_dtype_under_cudas_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It checks its inputs before it looks for a kernel, and has none for a CPU."""
    run_norms_as_cuda(monkeypatch)
    with pytest.raises(UserError) as caught:
        check_backend("xformers", "cpu", precision="bf16")
    assert "(needs a GPU: No operator found" in str(caught.value)
    assert "(torch.bfloat16)" in str(caught.value)
    monkeypatch.setattr(SameDtypeAttention, "__call__", WanAttnProcessor.__call__)
    with pytest.raises(UserError, match="should either all have the same dtype"):
        check_backend("xformers", "cpu", precision="bf16")


@pytest.mark.gpu
def test_backends_on_a_gpu() -> None:
    bf16 = available_backends("cuda", precision="bf16")
    fp32 = available_backends("cuda", precision="fp32")
    assert bf16["native"].ability == fp32["native"].ability == "trains"
    assert bf16["_native_flash"].ability == "trains"
    with pytest.raises(UserError, match=r"_native_flash cannot train on cuda in fp32 .*with model"):
        check_backend("_native_flash", "cuda", precision="fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["xformers", "flash", "_native_flash", "_native_cudnn"])
def test_a_run_trains_on_a_gpu_with_the_kernels_that_doctor_recommends(
    name: str, make_config: Callable[..., RunConfig]
) -> None:
    state = available_backends("cuda", precision="bf16", head_dim=24)[name]
    if state.ability == "missing package":
        pytest.skip(str(state))
    assert state.ability == "trains", state
    train(make_config(f"model.attention={name}", "model.precision=bf16"))


@pytest.mark.gpu
def test_sage_is_refused_for_training_on_a_gpu() -> None:
    state = available_backends("cuda", precision="bf16")["sage"]
    if state.ability == "missing package":
        pytest.skip(str(state))
    assert state.ability == "inference only"
