"""AdamW for bf16 weights (`optim.name: adamw_bf16_kahan`), with Kahan's compensation.

A step of AdamW moves a weight by about the learning rate, and bf16 has 8 bits: a step below 1/512
of the weight is rounded away, every time. Here a weight is the sum of two bf16 numbers: what the
model computes with, and the rest that rounding cut off it (Kahan 1965; for training in bf16,
Zamirai et al. 2020, arXiv 2010.06192). The two are added in fp32, torch's fused AdamW takes its
step, and the sum is split again: 16 bits of the weight are kept, and a step is lost below 2^-18 of
it.

The first moment is kept in bf16, as optimi's AdamW does. optimi keeps the second so as well, with
beta2 0.99; with the 0.999 of AdamW and of every recipe here, a bf16 second moment cannot fall: a
thousandth less is rounded back to what it was. So it is fp32 here. optimi's own (torch-optimi
0.3.3) is not taken for that, and because it steps whatever the device has found of the gradient.
"""

from typing import Any

import torch
from torch import Tensor

from alignlab.training.optimizer_step import StepByTensor, fp32_state

REST = "rest"


class KahanAdamW(StepByTensor):
    """AdamW over bf16 weights and the rests beside them; fp32 weights have AdamW's own step."""

    def fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        state = fp32_state(weight)
        if weight.dtype == torch.bfloat16:
            state["exp_avg"] = torch.zeros_like(weight)
            state[REST] = torch.zeros_like(weight)
        return state

    def update(self, weight: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        assert weight.grad is not None
        if weight.dtype != torch.bfloat16:
            self.fused_step(weight, weight.grad, state, group)
            return
        whole = weight.float() + state[REST]
        wide = state | {"exp_avg": state["exp_avg"].float()}
        self.fused_step(whole, weight.grad.float(), wide, group)
        state["exp_avg"].copy_(wide["exp_avg"])
        rounded = whole.to(torch.bfloat16)
        rest = (whole - rounded).to(torch.bfloat16)
        # a rest of exactly half a step may be split the other way round
        weight.copy_(self.held(weight, rounded))
        state[REST].copy_(self.held(state[REST], rest))
