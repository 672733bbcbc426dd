"""Attention backends are tried, and a recipe that names one gets a usable answer."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

from alignlab.errors import UserError
from alignlab.models.attention_backends import available_backends, backend_names, check_backend


def test_all_of_diffusers_backends_are_reported() -> None:
    assert set(available_backends("cpu")) == {backend.value for backend in AttentionBackendName}
    assert backend_names()[0] == "native"


def test_native_works_on_the_cpu_and_cuda_kernels_do_not() -> None:
    states = available_backends("cpu")
    assert states["native"] is None and states["_native_math"] is None
    for name in ("_native_cudnn", "_native_efficient", "flash", "sage"):
        assert states[name], f"{name} cannot work on a CPU"


def test_every_reason_is_one_line() -> None:
    reasons = [reason for reason in available_backends("cpu").values() if reason is not None]
    assert reasons and not any("\n" in reason or not reason.strip() for reason in reasons)


@pytest.mark.parametrize("name", [n for n, why in available_backends("cpu").items() if why is None])
def test_what_is_said_to_work_trains_a_wan(name: str) -> None:
    check_backend(name, "cpu")
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
    )
    transformer.set_attention_backend(name)
    try:
        video = torch.randn(1, 4, 1, 4, 4)
        out = transformer(video, torch.tensor([500]), torch.randn(1, 3, 8), return_dict=False)[0]
        out.square().mean().backward()
    finally:
        transformer.reset_attention_backend()
    gradient = transformer.blocks[0].attn1.to_q.weight.grad
    assert gradient is not None and float(gradient.abs().sum()) > 0


def test_unknown_backend_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"model\.attention: .*'nativ', did you mean 'native'"):
        check_backend("nativ", "cpu")


def test_unusable_backend_gets_reason_and_those_that_work() -> None:
    with pytest.raises(UserError) as caught:
        check_backend("_native_cudnn", "cpu")
    assert "does not work on cpu: " in str(caught.value)
    assert "these do: native, " in str(caught.value)


def test_a_backend_without_gradient_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def forward_only(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(query)

    replace(monkeypatch, forward_only)
    with pytest.raises(UserError, match="no gradient, so it cannot train"):
        check_backend("_native_math", "cpu")


@pytest.mark.parametrize("wrong", [2.0, float("nan")])
def test_a_backend_with_wrong_numbers_is_refused(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query * wrong

    replace(monkeypatch, off)
    with pytest.raises(UserError, match="its result is off by"):
        check_backend("_native_math", "cpu")


def replace(monkeypatch: pytest.MonkeyPatch, function: object) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    math = AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(registry._backends, math, function)
    monkeypatch.setitem(registry._supported_arg_names, math, {"query", "key", "value"})


@pytest.mark.gpu
def test_backends_on_a_gpu() -> None:
    states = available_backends("cuda")
    assert states["native"] is None and states["_native_flash"] is None
    with pytest.raises(UserError, match=r"_native_flash does not work on cuda: .*float"):
        check_backend("_native_flash", "cuda", dtype=torch.float32)
