"""The optimizer of a recipe (`optim.name`, `optim.offload`)."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import nn

from alignlab.config.optim import AdamWConfig
from alignlab.distributed.sharding import alike
from alignlab.errors import UserError
from alignlab.training.kahan_adamw import KahanAdamW
from alignlab.training.optimizer_step import AdamW, StepByTensor


def check_optimizer(config: AdamWConfig, device: torch.device) -> None:
    """Refuses an optimizer that cannot run here, before any work.

    Raises:
        UserError: its package is not installed, or there is no GPU that its state could leave.
    """
    check_optimizer_package(config)
    if config.offload and device.type != "cuda":
        raise UserError(
            f"optim.offload: weights are on {device}, whose memory is the host's, and no GPU is "
            "relieved; remove it"
        )


def check_optimizer_package(config: AdamWConfig) -> None:
    """Refuses an optimizer whose package is not installed.

    Raises:
        UserError: it names what installs it.
    """
    if config.name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optim.name: adamw_8bit needs bitsandbytes, which is not installed: pip install "
            "'alignlab[bitsandbytes]', or set optim.name: adamw"
        )


def build_optimizer(
    parameters: Sequence[nn.Parameter], config: AdamWConfig
) -> torch.optim.Optimizer:
    """AdamW with the recipe's settings over the parameters that are trained.

    Raises:
        UserError: as `check_optimizer_package`.
    """
    trained = [p for p in parameters if p.requires_grad]
    lr, betas, weight_decay = config.lr, config.betas, config.weight_decay
    if config.name == "adamw" and not config.offload:
        groups = [{"params": group} for group in alike(trained)]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    return _class_of(config)(
        trained, lr=lr, betas=betas, weight_decay=weight_decay, offload=config.offload
    )


def _class_of(config: AdamWConfig) -> type[StepByTensor]:
    if config.name == "adamw":
        return AdamW
    if config.name == "adamw_bf16_kahan":
        return KahanAdamW
    check_optimizer_package(config)
    from alignlab.training.adamw_8bit import AdamW8bit  # imports bitsandbytes

    return AdamW8bit
