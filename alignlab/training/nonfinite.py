"""Stops a run whose numbers are no longer finite, without stalling the device at every step.

Scalars of a step (losses, features, the norm of the gradient) are looked at in every step, on the
device; what a step leaves behind (weights, their average, the optimizer's moments) where a row is
logged or a checkpoint is due. Both are raised there: the device is waited for anyway, and nothing
that is not finite is ever saved. A step with a gradient that is not finite is taken all the same:
to look before it would make the host wait in every step, and what it spoils is never kept.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from alignlab.errors import UserError
from alignlab.training.checkpoint import RunState, TrainState

FEATURES = "features/"
"""Prefix of the log names of teachers' features."""
STATE = {
    "weights": "weights",
    "ema": "the moving average of the weights (optim.ema)",
    "exp_avg": "the optimizer's exp_avg",
    "exp_avg_sq": "the optimizer's exp_avg_sq",
}
"""What a step leaves behind, and what it is called."""


class NonFiniteWatch:
    """Remembers, on the device, the first step at which each scalar was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: dict[str, Tensor] = {}

    def check(self, step: int, scalars: Mapping[str, Tensor]) -> None:
        """Looks at a step's scalars without waiting for the device."""
        for key, value in scalars.items():
            bad = torch.where(torch.isfinite(value), -1, step).to(self._device)
            first = self._first.get(key, torch.tensor(-1, device=self._device))
            self._first[key] = torch.where(first >= 0, first, bad)

    def raise_if_broken(self, last_good: Path | None) -> None:
        """Raises UserError that names the first step and term, if any was not finite."""
        broken = {k: int(v) for k, v in self._first.items() if int(v) >= 0}
        if not broken:
            return
        step = min(broken.values())
        # in the order of the step: what comes first broke what comes after it
        by_rank: dict[int, list[str]] = {}
        for key in sorted(key for key, value in broken.items() if value == step):
            by_rank.setdefault(_rank(key), []).append(key)
        culprits = by_rank[min(by_rank)]
        kept = f"the last good checkpoint is {last_good}" if last_good else "no checkpoint yet"
        fix = "Lower optim.lr or the objective's weight"
        if culprits[0].startswith(FEATURES):
            fix = "Take other weights or another feature of that teacher"
        raise UserError(f"step {step}: {', '.join(culprits)} is not finite; stopped, {kept}. {fix}")


def _rank(key: str) -> int:
    """0 for a term of the loss, 1 for what is made of all terms, 2 for what the step leaves."""
    if key in STATE.values():
        return 2
    return int(key in ("loss/total", "grad/norm"))


def state_norms(state: TrainState) -> dict[str, Tensor]:
    """Norms, on the device, of what a step left behind; a finite loss says nothing of it.

    Weights and their average: Euclidean. The optimizer's moments: their largest value, since the
    squares of sound second moments may be beyond fp32.
    """
    norms = {STATE["weights"]: get_total_norm(list(state.names))}
    if isinstance(state, RunState) and state.ema is not None:
        norms[STATE["ema"]] = get_total_norm(list(state.ema.values()))
    for key in ("exp_avg", "exp_avg_sq"):
        moments = [s[key] for s in state.optimizer.state.values() if key in s]
        if moments:
            norms[STATE[key]] = get_total_norm(moments, norm_type=torch.inf)
    return norms
