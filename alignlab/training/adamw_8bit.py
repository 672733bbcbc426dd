"""AdamW with moments in 8 bits (`optim.name: adamw_8bit`), through bitsandbytes.

Its kernels and tables are those of `bitsandbytes.optim.AdamW8bit` (Dettmers et al. 2021, arXiv
2110.02861): blocks of 256 numbers with an fp32 scale each, tensors of fewer than 4096 numbers in
fp32. The loop is not: bitsandbytes waits for the GPU after every tensor, and steps whatever the
device has found of the gradient.
"""

from typing import Any

import torch
from torch import Tensor

from alignlab.config.optim import BLOCK_8BIT
from alignlab.training.optimizer_step import EPS, StepByTensor, fp32_state

SMALLEST = 4096
"""Numbers of a tensor from which on its moments have 8 bits: bitsandbytes' `min_8bit_size`."""
SCALES = ("absmax1", "absmax2")
CHANGED = ("state1", "state2", *SCALES)


class AdamW8bit(StepByTensor):
    """AdamW over fp32 weights, whose moments are `state1` and `state2` with scales `absmax*`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        import bitsandbytes.functional  # an extra

        super().__init__(*args, **settings)
        self._kernels = bitsandbytes.functional
        self._steps: dict[Tensor, int] = {}  # as the host counts them: the kernel asks it
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.numel() < SMALLEST:
            return fp32_state(weight)
        self._steps[weight] = 0
        blocks = -(-weight.numel() // BLOCK_8BIT)
        scales = {key: torch.zeros(blocks, device=weight.device) for key in SCALES}
        moments = {key: torch.zeros_like(weight, dtype=torch.uint8) for key in ("state1", "state2")}
        step = torch.zeros((), dtype=torch.float32, device=weight.device)
        return {"step": step, **moments, **scales}

    def update(self, weight: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        assert weight.grad is not None
        if "state1" not in state:
            self.fused_step(weight, weight.grad, state, group)
            return
        changed = [weight, *(state[key] for key in CHANGED)]
        before = [value.clone() for value in changed]
        beta1, beta2 = group["betas"]
        signed, unsigned = self._tables_on(weight.device)
        self._kernels.optimizer_update_8bit_blockwise(
            "adam",
            weight.grad.contiguous(),
            weight,
            state["state1"],
            state["state2"],
            beta1,
            beta2,
            0.0,
            0.0,
            EPS,
            self._next_step(weight, state["step"]),
            group["lr"],
            signed,
            unsigned,
            state["absmax1"],
            state["absmax2"],
            group["weight_decay"],
        )
        for was, value in zip(before, changed, strict=True):
            value.copy_(self.held(was, value))
        state["step"].add_(1 if self.found_inf is None else 1 - self.found_inf)

    def _next_step(self, weight: Tensor, step: Tensor) -> int:
        """Which step a tensor takes, 1-based; only that of a checkpoint is asked of the device."""
        if weight not in self._steps:  # resumed
            self._steps[weight] = int(step)
        self._steps[weight] += 1
        return self._steps[weight]

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The numbers that 8 bits stand for, of the first and the second moment."""
        if device not in self._tables:
            signed, unsigned = (self._kernels.create_dynamic_map(signed=s) for s in (True, False))
            self._tables[device] = (signed.to(device), unsigned.to(device))
        return self._tables[device]
