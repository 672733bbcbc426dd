"""Stops a run whose losses are no longer finite, without stalling the device at every step."""

from pathlib import Path

import torch
from torch import Tensor

from alignlab.errors import UserError


class NonFiniteWatch:
    """Remembers, on the device, the first step at which each scalar was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: dict[str, Tensor] = {}

    def check(self, step: int, scalars: dict[str, Tensor]) -> None:
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
        terms = sorted(key for key, value in broken.items() if value == step)
        # loss/total is a sum: name the terms that broke it, if one of them did
        culprits = [t for t in terms if t not in ("loss/total", "grad/norm")] or terms
        kept = f"the last good checkpoint is {last_good}" if last_good else "no checkpoint yet"
        raise UserError(
            f"step {step}: {', '.join(culprits)} is not finite; stopped, {kept}. "
            "Lower optim.lr or the objective's weight"
        )
