"""Low-rank adapters on a Wan transformer, through PEFT."""

import peft
import torch
from diffusers import WanTransformer3DModel
from diffusers.training_utils import cast_training_params
from torch import nn

from alignlab.config.data import unknown_name
from alignlab.config.model import LoraConfig
from alignlab.errors import UserError
from alignlab.randomness import global_draws


def add_lora(transformer: WanTransformer3DModel, lora: LoraConfig, *, seed: int) -> None:
    """Freezes the transformer and adds a fp32 LoRA that leaves its output as it was.

    The adapter is drawn on the CPU from `seed` alone: two runs of a comparison start from the
    same weights whatever was drawn before, and on whatever device they run.

    Raises:
        UserError: a target names no module of the transformer.
    """
    layers = [n for n, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            # blocks.0.attn1.to_out.0 -> to_out.0
            short = sorted({n.split(".", 3)[-1] for n in layers if n.startswith("blocks.0.")})
            raise UserError(f"model.lora.targets: {unknown_name('linear layer', target, short)}")
    with global_draws(seed, "lora"):
        transformer.add_adapter(
            peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
        )
    cast_training_params(transformer, dtype=torch.float32)
