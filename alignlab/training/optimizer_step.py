"""AdamW over one weight tensor after another, the ground of every optimizer but torch's own.

Working tensor by tensor, a step needs room for the widened state of one of them, not of all, and
the state can live in the host's memory between steps. Each update is torch's fused AdamW or obeys
`found_inf` as it does: in a step that is broken nothing changes, and the host waits for nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as torch_adamw

EPS = 1e-8  # torch's


class StepByTensor(torch.optim.Optimizer, ABC):
    """AdamW whose state is made, used and put back for each weight tensor in turn.

    Args:
        parameters: what is trained.
        lr, betas, weight_decay: AdamW's; weight decay is decoupled.
        offload: keep the state in the host's memory, pinned where weights are on a GPU; a step ends
            when it is back there. Single numbers (`step`) stay on the device.

    Attributes:
        found_inf: not 0 in a step that must change nothing; a tensor on the device, as
            `torch.amp.GradScaler` sets it.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        offload: bool = False,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._offload = offload

    @abstractmethod
    def fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state of a weight tensor before its first step, on its device."""

    @abstractmethod
    def update(self, weight: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """One step of a weight tensor that has a gradient, in place, unless `found_inf`.

        Args:
            weight: what is trained.
            state: its own, on its device.
            group: with `lr`, `betas` and `weight_decay`.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of every weight that has a gradient."""
        assert closure is None
        devices = set()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                kept = self.state[weight]
                if not kept:
                    fresh = self.fresh_state(weight)
                    kept.update({k: self.placed(weight, value) for k, value in fresh.items()})
                state = {k: self._fetched(weight, value) for k, value in kept.items()}
                self.update(weight, state, group)
                for name, value in state.items():
                    if value is not kept[name]:
                        kept[name].copy_(value, non_blocking=True)
                devices.add(weight.device)
        if self._offload:
            for device in devices:
                if device.type == "cuda":  # checkpoints and checks read the host's copy
                    torch.cuda.current_stream(device).synchronize()

    def placed(self, weight: Tensor, value: Tensor) -> Tensor:
        """A copy of a state tensor where it lives between steps."""
        if not self._is_offloaded(value):
            return value.to(weight.device, copy=True)
        pinned = weight.device.type == "cuda"
        host = torch.empty_like(value, device="cpu", pin_memory=pinned)
        return host.copy_(value)

    def _fetched(self, weight: Tensor, kept: Tensor) -> Tensor:
        if not self._is_offloaded(kept):
            return kept
        return torch.empty_like(kept, device=weight.device).copy_(kept, non_blocking=True)

    def _is_offloaded(self, value: Tensor) -> bool:
        return self._offload and value.ndim > 0

    def fused_step(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        """torch's fused AdamW on fp32 tensors, in place, unless `found_inf`.

        Args:
            weight, gradient: fp32.
            state: with `exp_avg`, `exp_avg_sq` and `step`, fp32.
            group: see `update`.
        """
        torch_adamw(
            [weight],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPS,
            maximize=False,
        )

    def held(self, before: Tensor, after: Tensor) -> Tensor:
        """`after`, or in a broken step `before`."""
        if self.found_inf is None:
            return after
        return torch.where(self.found_inf > 0, before, after)


class AdamW(StepByTensor):
    """torch's fused AdamW, to the bit, tensor by tensor: where its state is offloaded."""

    def fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        return fp32_state(weight)

    def update(self, weight: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        assert weight.grad is not None
        self.fused_step(weight, weight.grad, state, group)


def fp32_state(weight: Tensor) -> dict[str, Tensor]:
    """AdamW's: two fp32 moments and the number of steps."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=weight.device),
        "exp_avg": torch.zeros_like(weight, dtype=torch.float32),
        "exp_avg_sq": torch.zeros_like(weight, dtype=torch.float32),
    }
