"""What a step says of itself, on the device until somebody reads it.

Between two log rows nobody does: a row holds the means of its own step, so those of the steps
before it are never made. Shape letters: B samples of a micro-batch, then of a step on this rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from alignlab.distributed.ranks import Ranks


class SampleTerms(Mapping[str, Tensor]):
    """Terms by log name, one value per sample.

    `terms[name]` holds the values of the samples that count in it. Where not all do, the host waits
    for their number: between log rows, read `values_of` and `counting`.

    Args:
        values: detached, (B,) each, kept as `values_of`.
        counting: by name, which samples count, bool (B,); all of them where the name is missing.
    """

    def __init__(
        self, values: Mapping[str, Tensor], counting: Mapping[str, Tensor] | None = None
    ) -> None:
        self.values_of = dict(values)
        self.counting = dict(counting or {})

    @classmethod
    def joined(cls, parts: Sequence["SampleTerms"]) -> "SampleTerms":
        """Those of the micro-batches of a step."""
        values, counting = (
            {
                key: torch.cat([side[key] for side in sides if key in side])
                for key in {key: None for side in sides for key in side}
            }
            for sides in ([p.values_of for p in parts], [p.counting for p in parts])
        )
        return cls(values, counting)

    def __getitem__(self, name: str) -> Tensor:
        values = self.values_of[name]
        return values[self.counting[name]] if name in self.counting else values

    def __contains__(self, name: object) -> bool:
        return name in self.values_of  # and no value is read, for which the host would wait

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of)

    def __len__(self) -> int:
        return len(self.values_of)

    def sums(self, names: Sequence[str]) -> Tensor:
        """Sum in fp32 and number of the values that count, (2, names), without waiting."""
        sums, counts = [], []
        for name in names:
            values = self.values_of[name].float()
            counting = self.counting.get(name, torch.ones_like(values, dtype=torch.bool))
            sums.append(values.where(counting, 0.0).sum())
            counts.append(counting.sum().float())
        return torch.stack([torch.stack(sums), torch.stack(counts)])

    def finite(self) -> dict[tuple[str, ...], Tensor]:
        """Whether the values that count are finite, bool (names,) by names, without waiting."""
        by_length: dict[int, dict[str, Tensor]] = {}
        for name, values in self.values_of.items():
            if name in self.counting:
                values = values.where(self.counting[name], 0.0)
            by_length.setdefault(len(values), {})[name] = values.float()
        return {
            tuple(alike): torch.stack(list(alike.values())).isfinite().all(1)
            for alike in by_length.values()
        }


class StepScalars(Mapping[str, Tensor]):
    """A step's row of the log: means over the samples of all ranks, made when first read.

    All ranks must read the same steps. A term in which no sample counts is left out.

    Args:
        terms: of this rank.
        norm: of the gradient.
        settings: exact numbers that the step used.
        ranks: this rank and those that train with it.
    """

    def __init__(
        self, terms: SampleTerms, norm: Tensor, settings: Mapping[str, float], ranks: Ranks
    ) -> None:
        self._terms = terms
        self._norm = norm
        self._settings = settings
        self._ranks = ranks

    @cached_property
    def _scalars(self) -> dict[str, Tensor]:
        exact = {k: torch.tensor(v, dtype=torch.float64) for k, v in self._settings.items()}
        return self._ranks.means(self._terms) | {"grad/norm": self._norm} | exact

    def __getitem__(self, name: str) -> Tensor:
        return self._scalars[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scalars)

    def __len__(self) -> int:
        return len(self._scalars)
