"""How much of a training step the alignment loss takes, by implementation of its kernel.

A step of a Wan transformer with random weights on random latents, text embeddings, reference
latents and teacher features: what is timed does not depend on their values. The teacher's own
forward pass is left out. Sides (plain fine-tuning, and RefAlign with each implementation) run
interleaved in one process. Shape letters: B batch, C channels, T, H, W latent frames, height and
width, K references, P tokens of a reference, L text tokens, D width.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from alignlab.environment import describe_environment
from alignlab.experiments.compare.measure import seconds_of
from alignlab.kernels.pull_push import Impl
from alignlab.losses import build_objective
from alignlab.losses.objective import Features
from alignlab.losses.refalign import RefAlignConfig
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.progress import step_progress
from alignlab.runs.atomic_files import write_text

WARMUP_STEPS = 2


@dataclass(frozen=True)
class ModelSize:
    """A transformer and what it is trained on.

    Args:
        heads: of 128 channels each.
        layers: transformer blocks.
        ffn_dim: hidden width of a block's feed-forward part.
        latents: (C, T, H, W) of a clip.
        blocks: aligned blocks, counted from the first.
        teacher_dim: width of the teacher's features.
    """

    heads: int
    layers: int
    ffn_dim: int
    latents: tuple[int, int, int, int]
    blocks: int
    teacher_dim: int


SIZES = {
    # Wan2.1-T2V-1.3B on 81 frames of 480x832, with DINOv3-L and RefAlign's first nine blocks
    "wan2.1-1.3b": ModelSize(12, 30, 8960, (16, 21, 60, 104), 9, 1024),
    "smoke": ModelSize(1, 3, 256, (16, 2, 8, 8), 2, 48),
}


@dataclass(frozen=True)
class Share:
    """Medians over steps: seconds of a step, and the part of it that the loss added."""

    side: str
    step_s: float
    share: float
    parameters: int


def measure_share(
    size: ModelSize,
    impls: Sequence[Impl],
    *,
    references: int = 3,
    steps: int = 10,
    device: torch.device,
) -> list[Share]:
    """Times forward, backward and AdamW of one clip with and without RefAlign.

    Args:
        size: see `SIZES`.
        impls: implementations of `alignlab.kernels.pull_push` to time.
        references: K, images beside the clip; their tokens are as many as a latent frame's.
        steps: timed steps of each side, after two that are not counted.
        device: where; on CUDA the forward pass runs in bf16, as a training run would.

    Raises:
        ValueError: an implementation cannot run here.
    """
    step = _Step(size, references, device)
    sides: dict[str, Callable[[], object]] = {"none": lambda: step(None)}
    for impl in impls:
        objective = step.refalign(impl)
        sides[impl] = lambda objective=objective: step(objective)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with step_progress("share", total=steps + WARMUP_STEPS) as advance:
        for number in range(steps + WARMUP_STEPS):
            names = list(sides)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(seconds_of(sides[name], device))
            advance(number + 1, "")
    kept = {name: times[WARMUP_STEPS:] for name, times in seconds.items()}
    return [
        Share(
            name,
            statistics.median(times),
            statistics.median((t - n) / t for t, n in zip(times, kept["none"], strict=True)),
            step.parameters,
        )
        for name, times in kept.items()
    ]


class _Step:
    """One training step on inputs that stay the same."""

    def __init__(self, size: ModelSize, references: int, device: torch.device) -> None:
        self._size, self._device, self._references = size, device, references
        channels, _, height, width = size.latents
        self._model = WanTransformer3DModel(
            num_attention_heads=size.heads,
            attention_head_dim=128,
            in_channels=channels,
            out_channels=channels,
            num_layers=size.layers,
            ffn_dim=size.ffn_dim,
        ).to(device)
        self._model.train()
        self._model.enable_gradient_checkpointing()
        self.parameters = sum(p.numel() for p in self._model.parameters())
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5)
        draw = torch.Generator(device).manual_seed(0)
        self._noisy, self._target = torch.randn(
            2, 1, *size.latents, generator=draw, device=device
        ).unbind()
        images = (references, channels, height, width)
        self._images = torch.randn(images, generator=draw, device=device)
        text = (1, 512, self._model.config["text_dim"])
        self._text_BLD = torch.randn(text, generator=draw, device=device)
        tokens = (1, references, height // 2 * (width // 2), size.teacher_dim)
        features = torch.randn(tokens, generator=draw, device=device)
        self._teacher = Features(features, (references, height // 2, width // 2))

    def refalign(self, impl: Impl) -> nn.Module:
        """RefAlign with its projectors, which the optimizer trains as well."""
        size = self._size
        config = RefAlignConfig(teacher="teacher", blocks=tuple(range(size.blocks)), impl=impl)
        objective = build_objective(
            config, student_dim=size.heads * 128, teacher_dims={"teacher": size.teacher_dim}
        ).to(self._device)
        self._optimizer.add_param_group({"params": list(objective.parameters())})
        return objective

    def __call__(self, objective: nn.Module | None) -> None:
        blocks = range(self._size.blocks) if objective is not None else ()
        timesteps_B = torch.full((1,), 500.0, device=self._device)
        bf16 = torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"
        )
        with ReferenceBranch(self._model, blocks=blocks) as branch:
            with bf16:
                out = branch(self._noisy, timesteps_B, self._text_BLD, [self._images])
                loss: Tensor = F.mse_loss(out.velocity_BCTHW, self._target)
                if objective is not None:
                    student = {block: tokens.reference for block, tokens in out.taps.items()}
                    loss = loss + objective(student, {"teacher": self._teacher}).loss_B.mean()
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def write_share(shares: Sequence[Share], size: str, out: Path) -> None:
    """Keeps the figures with the environment that they belong to."""
    rows = [asdict(share) for share in shares]
    found = {"size": size, "sides": rows, "environment": describe_environment()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1) + "\n")
