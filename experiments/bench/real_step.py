"""A training step of Wan 1.3B at its real size: with everything encoded before, and encoded live.

Weights are random and made on the device, nothing is read or downloaded: what is timed and held
does not depend on their values. Encoders are as a run has them: VAE in fp32, UMT5-XXL and DINOv3-L
in bf16 on CUDA. Shape letters: B batch, C channels, T frames, H, W pixels, K references.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel, UMT5Config, UMT5EncoderModel

from alignlab.experiments.bench.gpu_phases import Findings
from alignlab.experiments.bench.wan_step import SIZES, TEXT_TOKENS, ModelSize, WanInputs, WanStep
from alignlab.experiments.compare.measure import seconds_of
from alignlab.losses.objective import Features
from alignlab.units import GIB

REFERENCES = 3
ROUNDS = 3


@dataclass(frozen=True)
class EncoderSizes:
    """The frozen models beside a transformer.

    Args:
        frames: of a clip.
        height, width: pixels.
        vae: arguments of `AutoencoderKLWan`.
        text: arguments of `UMT5Config`.
        teacher: arguments of `DINOv3ViTConfig`.
    """

    frames: int
    height: int
    width: int
    vae: dict[str, Any]
    text: dict[str, Any]
    teacher: dict[str, Any]


ENCODERS = {
    # Wan 2.1's autoencoder (diffusers' defaults), UMT5-XXL, DINOv3 ViT-L/16
    "wan2.1-1.3b": EncoderSizes(
        81,
        480,
        832,
        {},
        {
            "d_model": 4096,
            "d_ff": 10240,
            "d_kv": 64,
            "num_heads": 64,
            "num_layers": 24,
            "vocab_size": 256384,
        },
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_register_tokens": 4,
        },
    ),
    "smoke": EncoderSizes(
        5,
        64,
        64,
        {"base_dim": 8, "num_res_blocks": 1},
        {
            "d_model": 4096,  # the width of text that the transformer reads
            "d_ff": 16,
            "d_kv": 8,
            "num_heads": 2,
            "num_layers": 1,
            "vocab_size": 64,
        },
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_register_tokens": 4,
        },
    ),
}


class Encoders:
    """VAE, text encoder and teacher with random weights, and a clip of noise that they encode."""

    def __init__(self, sizes: EncoderSizes, device: torch.device) -> None:
        self._sizes, self._device = sizes, device
        half = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            self.vae = AutoencoderKLWan(**sizes.vae)
            self.teacher = DINOv3ViTModel(DINOv3ViTConfig(**sizes.teacher)).to(half)
            with _default_dtype(half):  # in fp32 the text encoder would take twice its memory
                self.text = UMT5EncoderModel(UMT5Config(**sizes.text))
        for model in self.models:
            model.requires_grad_(False).eval()
        shape = (1, 3, sizes.frames, sizes.height, sizes.width)
        self._clip_BCTHW = torch.rand(shape, device=device) * 2 - 1
        self._ids_BL = torch.randint(0, sizes.text["vocab_size"], (1, TEXT_TOKENS), device=device)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """All of them."""
        return self.vae, self.text, self.teacher

    def move(self, device: torch.device) -> None:
        """Takes the models away from the device, or back."""
        for model in self.models:
            model.to(device)

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Latents of the clip, (1, C, T, H, W)."""
        return self._encode(self._clip_BCTHW)

    @torch.no_grad()
    def references(self) -> Tensor:
        """Latents of the references, one at a time, (K, C, H, W)."""
        frames = self._clip_BCTHW[:, :, :REFERENCES].split(1, dim=2)
        return torch.cat([self._encode(frame)[:, :, 0] for frame in frames])

    @torch.no_grad()
    def captions(self) -> Tensor:
        """Embeddings of a caption, padded as Wan pads it, (1, L, D)."""
        embedded: Tensor = self.text(self._ids_BL).last_hidden_state
        return embedded.float()

    @torch.no_grad()
    def features(self, frames: int = REFERENCES) -> Features:
        """The teacher's patch tokens of the first frames, eight at a time."""
        pixels = self._clip_BCTHW[0, :, :frames].transpose(0, 1).to(self.teacher.dtype)
        skipped = 1 + int(self._sizes.teacher["num_register_tokens"])
        parts = [self.teacher(part).last_hidden_state[:, skipped:] for part in pixels.split(8)]
        tokens = torch.cat(parts).float()
        grid = (frames, self._sizes.height // 16, self._sizes.width // 16)
        return Features(tokens.flatten(0, 1)[None].unflatten(1, (frames, -1)), grid)

    def inputs(self) -> WanInputs:
        """Everything that a step reads of the clip."""
        return WanInputs(self.clip(), self.captions(), self.references(), self.features())

    def _encode(self, pixels_BCTHW: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(pixels_BCTHW).latent_dist.mode()
        return latents


def measure_step(found: Findings) -> None:
    """Times encoders and steps and keeps peaks of memory, the LoRA first."""
    name = "wan2.1-1.3b" if found.is_full else "smoke"
    encoders: Encoders | None = None
    sides: dict[str, tuple[float, float]] = {}
    trained: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    for train in trained:
        if found.left() < (35 if found.is_full else 3):
            found.say(f"{train}: not begun for want of time")
            continue
        step, objective = _build(SIZES[name], found.device, train)
        _cached(found, train, step, objective)
        if encoders is None:
            encoders = Encoders(ENCODERS[name], found.device)
            _encoder_times(found, encoders, ENCODERS[name].frames)
        else:
            encoders.move(found.device)
        sides[train] = _live(found, train, step, objective, encoders)
        encoders.move(torch.device("cpu"))  # so that the next peak without them is without them
        del step, objective
        _forget(found.device)
    if sides:
        _draw(sides, found)


def _build(
    size: ModelSize, device: torch.device, train: Literal["lora", "full"]
) -> tuple[WanStep, nn.Module]:
    step = WanStep(size, REFERENCES, device, train)
    return step, step.refalign("chunked")


def _cached(found: Findings, train: str, step: WanStep, objective: nn.Module) -> None:
    """The peak of memory of a step that encodes nothing, with no encoder on the device."""
    step(objective)
    peak = _peak_gib(found.device, lambda: step(objective))
    if peak is not None:
        found.row(f"{train}, encoded before", "peak memory", "GiB", [peak])
        found.say(f"{train}, encoded before: peak {peak:.1f} GiB, {step.parameters:,} trained")


def _encoder_times(found: Findings, encoders: Encoders, frames: int) -> None:
    latent_frames, rounds = 1 + (frames - 1) // 4, ROUNDS if found.is_full else 1
    parts: dict[str, Callable[[], object]] = {
        f"VAE, clip of {frames} frames": encoders.clip,
        f"VAE, {REFERENCES} references": encoders.references,
        "text encoder": encoders.captions,
        f"teacher, {REFERENCES} references": encoders.features,
        f"teacher, {latent_frames} frames": lambda: encoders.features(latent_frames),
        f"teacher, {frames} frames": lambda: encoders.features(frames),
    }
    for name, part in parts.items():
        peak = _peak_gib(found.device, part)  # not timed: the first call
        seconds = [seconds_of(part, found.device) for _ in range(rounds)]
        found.row(name, "time", "s", seconds)
        if peak is not None:
            found.row(name, "peak memory, all encoders there", "GiB", [peak])
        said = f", peak {peak:.1f} GiB" if peak is not None else ""
        found.say(f"{name}: {sorted(seconds)[rounds // 2]:.4g} s{said}")


def _live(
    found: Findings, train: str, step: WanStep, objective: nn.Module, encoders: Encoders
) -> tuple[float, float]:
    """Steps with all encoded before and live, in turns; gives both medians in seconds."""

    def cached() -> None:
        step(objective)

    def live() -> None:
        step(objective, encoders.inputs())

    sides = {"encoded before": cached, "encoded live": live}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peak = _peak_gib(found.device, live)  # not timed: the first call
    for number in range(ROUNDS if found.is_full else 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            seconds[name].append(seconds_of(sides[name], found.device))
        if found.left() < 0:
            break
    for name, times in seconds.items():
        found.row(f"{train}, {name}", "time", "s", times)
    if peak is not None:
        found.row(f"{train}, encoded live", "peak memory", "GiB", [peak])
    pairs = zip(seconds["encoded before"], seconds["encoded live"], strict=True)
    ratios = sorted(one / other for other, one in pairs)
    medians = [sorted(times)[len(times) // 2] for times in seconds.values()]
    found.row(train, "live over encoded before", "", ratios)
    said = f"; peak {peak:.1f} GiB" if peak is not None else ""
    found.say(
        f"{train}: {medians[0]:.4g} s encoded before, {medians[1]:.4g} s live, "
        f"{ratios[len(ratios) // 2]:.2f} times as long{said}"
    )
    return medians[0], medians[1]


def _peak_gib(device: torch.device, work: Callable[[], object]) -> float | None:
    """The most that torch's allocator held; None: it is counted on CUDA alone."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / GIB


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _draw(sides: dict[str, tuple[float, float]], found: Findings) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for place, (cached, live) in enumerate(sides.values()):
        axes.bar(place - 0.2, cached, 0.4, color="#0072b2", label="encoded before" * (not place))
        axes.bar(place + 0.2, live, 0.4, color="#d55e00", label="encoded live" * (not place))
    axes.set_xticks(range(len(sides)), list(sides))
    axes.set_ylabel("seconds a step")
    axes.legend(frameon=False)
    figure.savefig(found.out / "step.png", dpi=110)
