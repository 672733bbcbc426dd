"""Which diffusers attention backends can train here, found out by training a Wan block with them.

A backend sees what it would see in a run: queries, keys and values of a block, with and without
references, in the run's precision. Its attention outputs and its gradients are held against those
of torch's own attention.
Shape letters: B batch, C channels, T latent frames, H height, W width, K references, L text
tokens, D width.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.utils import is_kernels_available
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's
from torch import Tensor

from alignlab.config.data import unknown_name
from alignlab.config.model import GradientCheckpointing, LoraConfig, blocks_apart
from alignlab.distributed.ranks import mixed_precision
from alignlab.errors import UserError, one_line
from alignlab.models.gradient_checkpointing import checkpoint_blocks
from alignlab.models.lora import add_lora
from alignlab.models.reference_branch import ReferenceBranch

WAN_HEAD_DIM = 128  # of every released Wan model
TOLERANCE = 0.1  # relative; int8 attention stays well below, wrong results are far above
# 64 video tokens and 32 of references, 64 of text: what every backend's kernels accept.
FRAMES, SIZE, REFERENCES, TEXT_TOKENS = 4, 8, 2, 64
CHANNELS, TEXT_DIM = 4, 16
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")

# What a backend raises that is missing, does not suit the device, or has no backward pass.
PROBE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
    HTTPError,
)

Precision = Literal["fp32", "bf16"]
Ability = Literal[
    "trains", "inference only", "missing package", "needs a GPU", "does not work", "not tried"
]


@dataclass(frozen=True)
class BackendState:
    """What an attention backend can do on a device in a precision.

    Args:
        ability: `trains`; `inference only`: its output is right, but it has no gradient or a wrong
            one; `needs a GPU`: it was tried on the CPU and raised.
        reason: why it does not train, in one line; empty where it does.
    """

    ability: Ability
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.ability}: {self.reason}" if self.reason else self.ability


def backend_names() -> list[str]:
    """Every attention backend that this version of diffusers knows, the usual one first."""
    names = sorted(str(backend.value) for backend in AttentionBackendName)
    return sorted(names, key=lambda name: (name != "native", name.startswith("_")))


def check_backend(
    name: str,
    device: torch.device | str,
    *,
    precision: Precision = "fp32",
    train: Literal["full", "lora"] = "full",
    weights: Precision = "fp32",
    gradient_checkpointing: GradientCheckpointing = False,
    head_dim: int = WAN_HEAD_DIM,
) -> None:
    """Makes sure that `name` can train on `device`; a `*_hub` backend downloads its kernel.

    `native` is what the others are measured against, and is not tried.

    Args:
        name: a diffusers attention backend, e.g. `native`.
        device: where the model runs.
        precision: of the run.
        train: all weights, or a LoRA on weights in `precision`.
        weights: what all weights are kept in, where they are trained.
        gradient_checkpointing: as in the run.
        head_dim: width of the model's attention heads.

    Raises:
        UserError: no such backend, or it cannot train so; says why and lists those that can.
    """
    names = backend_names()
    if name not in names:
        raise UserError(f"model.attention: {unknown_name('attention backend', name, names)}")
    if name == AttentionBackendName.NATIVE:
        return
    state = BackendProbe(
        device,
        precision=precision,
        train=train,
        weights=weights,
        gradient_checkpointing=gradient_checkpointing,
        head_dim=head_dim,
    ).state(name)
    if state.ability == "trains":
        return
    others = available_backends(device, precision=precision, head_dim=head_dim)
    fix = ", ".join(other for other, can in others.items() if can.ability == "trains")
    if precision == "fp32":
        in_bf16 = BackendProbe(device, precision="bf16", head_dim=head_dim).state(name)
        if in_bf16.ability == "trains":
            fix += f"; with model.precision=bf16, {name} does"
    raise UserError(
        f"model.attention: {name} cannot train on {torch.device(device)} in {precision} ({state}); "
        f"these can: {fix}"
    )


def available_backends(
    device: torch.device | str, *, precision: Precision = "fp32", head_dim: int = WAN_HEAD_DIM
) -> dict[str, BackendState]:
    """Trains a Wan block with every backend. Nothing is downloaded.

    Args:
        device: where to try them.
        precision: as in `check_backend`.
        head_dim: as in `check_backend`.

    Returns:
        Name -> what it can do.
    """
    probe = BackendProbe(device, precision=precision, head_dim=head_dim)
    return {name: _hub_state(name) or probe.state(name) for name in backend_names()}


def _hub_state(name: str) -> BackendState | None:
    """Of a backend whose kernel is on Hugging Face's hub, without downloading it; None: another."""
    if not name.endswith("_hub"):
        return None
    if not is_kernels_available():
        return BackendState(
            "missing package",
            "Hugging Face's package `kernels` is not installed: pip install kernels",
        )
    return BackendState("not tried", "its kernel is downloaded when a recipe asks for it")


class BackendProbe:
    """Tries backends in a small Wan transformer of one block, forward and backward.

    Args: as of `check_backend`.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        precision: Precision = "fp32",
        train: Literal["full", "lora"] = "full",
        weights: Precision = "fp32",
        gradient_checkpointing: GradientCheckpointing = False,
        head_dim: int = WAN_HEAD_DIM,
    ) -> None:
        self._device = torch.device(device)
        self._precision: Precision = precision
        self._train = train
        self._kept_in = precision if train == "lora" else weights
        self._gradient_checkpointing = gradient_checkpointing
        self._head_dim = head_dim

    def state(self, name: str) -> BackendState:
        """What the backend of that name can do; the kernel of a `*_hub` backend is downloaded."""
        backend = AttentionBackendName(name)
        try:
            with attention_backend(backend):  # checks what it needs, and gets its kernel
                pass
        except PROBE_ERRORS as error:
            reached = name.endswith("_hub") and is_kernels_available()
            return BackendState("does not work" if reached else "missing package", _line(error))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                off = _difference(self._outputs(backend), self._native_outputs)
            except PROBE_ERRORS as error:
                on_cpu = self._device.type == "cpu"
                ability: Ability = "needs a GPU" if on_cpu else "does not work"
                return BackendState(ability, _line(error, *_kernel_warnings(error, caught)))
            if not off < TOLERANCE:  # also true of a NaN
                return BackendState("does not work", f"its output is off by {off:.0%}")
            try:
                gradients = self._gradients(backend)
            except PROBE_ERRORS as error:
                reason = _line(error, *_kernel_warnings(error, caught))
                return BackendState("inference only", reason)
        if gradients is None:
            return BackendState("inference only", "it has no gradient")
        off = _difference(gradients, self._native_gradients)
        if not off < TOLERANCE:
            return BackendState("inference only", f"its gradient is off by {off:.0%}")
        return BackendState("trains")

    @cached_property
    def _native_outputs(self) -> list[Tensor]:
        return self._outputs(AttentionBackendName.NATIVE)

    @cached_property
    def _native_gradients(self) -> list[Tensor]:
        gradients = self._gradients(AttentionBackendName.NATIVE)
        assert gradients is not None
        return gradients

    @torch.no_grad()
    def _outputs(self, backend: AttentionBackendName) -> list[Tensor]:
        """Outputs of self- and cross-attention."""
        outputs: list[Tensor] = []
        hooks = [
            attention.register_forward_hook(lambda module, inputs, out: outputs.append(out.float()))
            for attention in self._attentions
        ]
        try:
            for branch in self._branches:
                with branch, attention_backend(backend):
                    self._velocity(branch)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    @torch.enable_grad()
    def _gradients(self, backend: AttentionBackendName) -> list[Tensor] | None:
        """Gradients of the projections of self- and cross-attention; None: one has none."""
        self._transformer.zero_grad()
        for branch in self._branches:
            with branch, attention_backend(backend):  # checkpointing runs the block again in there
                self._velocity(branch).square().mean().backward()
        gradients = []
        for attention in self._attentions:
            for name in PROJECTIONS:
                weights = getattr(attention, name).parameters()
                found = [w.grad.float().flatten() for w in weights if w.grad is not None]
                if not found:
                    return None
                gradients.append(torch.cat(found))
        return gradients

    def _velocity(self, branch: ReferenceBranch) -> Tensor:
        with mixed_precision(self._device, self._precision):
            return branch(*self._inputs).velocity_BCTHW

    @cached_property
    def _transformer(self) -> WanTransformer3DModel:
        with torch.random.fork_rng(devices=[]):  # on the CPU: the same numbers for every device
            torch.default_generator.manual_seed(0)
            transformer = WanTransformer3DModel(
                num_layers=1,
                num_attention_heads=2,
                attention_head_dim=self._head_dim,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                text_dim=TEXT_DIM,
                freq_dim=16,
                ffn_dim=32,
                rope_max_seq_len=16,
            )
        if self._kept_in == "bf16":
            transformer.patch_embedding.to(torch.bfloat16)
            transformer.blocks.to(torch.bfloat16)
        if self._train == "lora":
            add_lora(transformer, LoraConfig(rank=4), seed=0)
        mode = self._gradient_checkpointing
        # of one block every k-th is this one
        checkpoint_blocks(transformer, mode if blocks_apart(mode) is None else True)
        return transformer.to(self._device).train()

    @cached_property
    def _attentions(self) -> list[Any]:
        block = self._transformer.blocks[0]
        return [block.attn1, block.attn2]

    @cached_property
    def _branches(self) -> list[ReferenceBranch]:
        return [
            ReferenceBranch(self._transformer, text_to_references=flag) for flag in (False, True)
        ]

    @cached_property
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Latents, timesteps, text and references of two samples; the first has no reference."""
        draw = torch.Generator().manual_seed(0)
        latents_BCTHW = torch.randn(2, CHANNELS, FRAMES, SIZE, SIZE, generator=draw)
        text_BLD = torch.randn(2, TEXT_TOKENS, TEXT_DIM, generator=draw)
        references = torch.randn(REFERENCES, CHANNELS, SIZE, SIZE, generator=draw).to(self._device)
        return (
            latents_BCTHW.to(self._device),
            torch.tensor([250.0, 750.0], device=self._device),
            text_BLD.to(self._device),
            [references[:0], references],
        )


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of a tensor to the one that is expected."""
    pairs = zip(actual, expected, strict=True)
    return max(float((mine - true).norm() / true.norm()) for mine, true in pairs)


def _kernel_warnings(error: Exception, caught: list[warnings.WarningMessage]) -> list[str]:
    """Why torch took none of its kernels: it says so in warnings and raises a general message."""
    if "No available kernel" not in str(error):
        return []
    return [str(one.message) for one in caught if "not used because" not in str(one.message)]


def _line(*messages: object) -> str:
    return " ".join(map(one_line, messages)).rstrip(".")
