"""Stops a run whose numbers are no longer finite, without stalling the device at every step.

Scalars of a step (losses, features, the norm of the gradient) are looked at in every step, on the
device and before the optimizer: from the first that is not finite on, no step changes a weight
(`alignlab.training.optim.step_unless`). What a step leaves behind (weights, their average, the
optimizer's moments) is looked at where a row is logged or a checkpoint is due. Both are raised
there, since the device is waited for anyway: nothing that is not finite is ever saved.
"""

from pathlib import Path

import torch
from torch import Tensor

from alignlab.distributed.ranks import Ranks
from alignlab.distributed.sharding import total_norm
from alignlab.errors import UserError
from alignlab.training.checkpoint import RunState, TrainState
from alignlab.training.kahan_adamw import REST

FEATURES = "features/"
"""Prefix of the log names of teachers' features."""
MOMENTS = ("exp_avg", "exp_avg_sq", "absmax1", "absmax2", REST)
"""Of the optimizer's state, what can stop being finite: 8 bits cannot, but their scales can."""
STATE = {
    "weights": "weights",
    "ema": "the moving average of the weights (optim.ema)",
    **{key: f"the optimizer's {key}" for key in MOMENTS},
}
"""What a step leaves behind, and what it is called."""


class NonFiniteWatch:
    """Remembers, on the device, the first step at which each scalar was not finite.

    Args:
        ranks: this rank, and those that train with it and stop with it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._first: dict[tuple[str, ...], Tensor] = {}

    def check(self, step: int, names: tuple[str, ...], finite_K: Tensor) -> None:
        """Takes in which scalars of a step are finite, bool (names,), without waiting for them."""
        first_K = torch.where(finite_K, -1, step)
        earlier_K = self._first.get(names)
        if earlier_K is not None:
            first_K = torch.where(earlier_K >= 0, earlier_K, first_K)
        self._first[names] = first_K

    def check_state(self, step: int, state: TrainState) -> None:
        """Looks at what the step left behind; a finite loss says nothing of it."""
        norms = state_norms(state)
        values = [norm.to(self._ranks.device) for norm in norms.values()]
        self.check(step, tuple(norms), torch.stack(values).isfinite())

    def is_broken(self) -> Tensor:
        """Whether any rank has seen anything that is not finite, a bool on the device."""
        firsts = [first_K.max() for first_K in self._first.values()]
        return self._ranks.total((torch.stack(firsts) >= 0).any().float()) > 0

    def raise_if_broken(self, last_good: Path | None) -> None:
        """Raises UserError on all ranks, which names the first step and term, if any was not
        finite on one of them."""
        names = [name for group in self._first for name in group]
        firsts = torch.cat(list(self._first.values())).tolist() if self._first else []
        broken: dict[str, int] = {}
        for found in self._ranks.gathered(list(zip(names, firsts, strict=True))):
            for name, step in found:
                if step >= 0:
                    broken[name] = min(step, broken.get(name, step))
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
    """Norms, on the device, of what a step left behind.

    Weights and their average: Euclidean. The optimizer's moments: their largest value, since the
    squares of sound second moments may be beyond fp32.
    """
    norms = {STATE["weights"]: total_norm(list(state.names))}
    if isinstance(state, RunState) and state.ema is not None:
        norms[STATE["ema"]] = total_norm(list(state.ema.values()))
    for key in MOMENTS:
        moments = [s[key] for s in state.optimizer.state.values() if key in s]
        if moments:
            norms[STATE[key]] = total_norm(moments, norm_type=torch.inf)
    return norms
