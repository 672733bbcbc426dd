"""One training step of a Wan transformer with random weights, at any size, from nothing on disk.

What is timed does not depend on the values of weights and inputs. Shape letters: B batch,
C channels, T, H, W latent frames, height and width, K references, P tokens of a reference, L text
tokens, D width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from alignlab.config.model import LoraConfig
from alignlab.losses import build_objective
from alignlab.losses.objective import Features
from alignlab.losses.refalign import RefAlignConfig
from alignlab.models.lora import add_lora
from alignlab.models.reference_branch import ReferenceBranch

TEXT_TOKENS = 512  # that Wan pads captions to


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


class WanInputs(NamedTuple):
    """What a step reads of a clip, encoded: latents (1, C, T, H, W), text (1, L, D), latents of
    references (K, C, H, W), the teacher's features of these."""

    latents_BCTHW: Tensor
    text_BLD: Tensor
    references_KCHW: Tensor
    teacher: Features


class WanStep:
    """Forward, backward and AdamW on one clip; `inputs` stay the same unless others are given.

    Args:
        size: see `SIZES`.
        references: K, images beside the clip.
        device: where; on CUDA the forward pass runs in bf16, as a training run would.
        train: `full` keeps fp32 weights; `lora` trains an adapter of rank 32 on frozen bf16 ones.
    """

    def __init__(
        self,
        size: ModelSize,
        references: int,
        device: torch.device,
        train: Literal["full", "lora"] = "full",
    ) -> None:
        self._size, self._device = size, device
        channels = size.latents[0]
        with device:
            self._model = WanTransformer3DModel(
                num_attention_heads=size.heads,
                attention_head_dim=128,
                in_channels=channels,
                out_channels=channels,
                num_layers=size.layers,
                ffn_dim=size.ffn_dim,
            )
        if train == "lora":
            _to_bf16(self._model)
            add_lora(self._model, LoraConfig(), seed=0)
        self._model.train()
        self._model.enable_gradient_checkpointing()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in trained)
        self._optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.inputs = self._draw(references)

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings that the transformer reads."""
        return int(self._model.config["text_dim"])

    def refalign(self, impl: str) -> nn.Module:
        """RefAlign with its projectors, which the optimizer trains as well."""
        size = self._size
        config = RefAlignConfig(teacher="teacher", blocks=tuple(range(size.blocks)), impl=impl)
        objective = build_objective(
            config, student_dim=size.heads * 128, teacher_dims={"teacher": size.teacher_dim}
        ).to(self._device)
        self._optimizer.add_param_group({"params": list(objective.parameters())})
        return objective

    def __call__(self, objective: nn.Module | None, inputs: WanInputs | None = None) -> None:
        """Takes the step, with the loss of `objective` if there is one."""
        given = inputs or self.inputs
        blocks = range(self._size.blocks) if objective is not None else ()
        timesteps_B = torch.full((1,), 500.0, device=self._device)
        noise = torch.randn_like(given.latents_BCTHW)
        noisy, target = (given.latents_BCTHW + noise) / 2, noise - given.latents_BCTHW
        bf16 = torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"
        )
        with ReferenceBranch(self._model, blocks=blocks) as branch:
            with bf16:
                out = branch(noisy, timesteps_B, given.text_BLD, [given.references_KCHW])
                loss: Tensor = F.mse_loss(out.velocity_BCTHW, target)
                if objective is not None:
                    student = {block: tokens.reference for block, tokens in out.taps.items()}
                    loss = loss + objective(student, {"teacher": given.teacher}).loss_B.mean()
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _draw(self, references: int) -> WanInputs:
        draw = torch.Generator(self._device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=self._device)

        channels, _, height, width = self._size.latents
        grid = (references, height // 2, width // 2)
        features = normal(1, references, grid[1] * grid[2], self._size.teacher_dim)
        return WanInputs(
            normal(1, *self._size.latents),
            normal(1, TEXT_TOKENS, self.text_dim),
            normal(references, channels, height, width),
            Features(features, grid),
        )


def _to_bf16(model: WanTransformer3DModel) -> None:
    """All weights but those that diffusers keeps in fp32 when it loads such a model."""
    kept = tuple(model._keep_in_fp32_modules or ())
    for name, weight in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            weight.data = weight.data.to(torch.bfloat16)
