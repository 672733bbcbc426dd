"""What a step says of itself, on the device until somebody reads it.

Between two log rows nobody does: a row holds the means of its own step, so those of the steps
before it are never made. Shape letters: B samples of a micro-batch, then of a step on this rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from alignlab.distributed.ranks import Ranks
from alignlab.losses.objective import Features, Terms
from alignlab.training.nonfinite import FEATURES

ALIGNED = "aligned/"
"""Prefix of the log names of how many samples had something to align."""
WATCHED = "watched/"
"""Prefix of the log names of what plateau schedules watch."""


class SampleTerms(Mapping[str, Tensor]):
    """Terms by log name, one value per sample.

    `terms[name]` holds the values of the samples that count in it. Where not all do, the host waits
    for their number: between log rows, read `values_of` and `counting`.

    Args:
        values: detached, (B,) each, kept as `values_of`.
        counting: by name, which samples count, bool (B,); all of them where the name is missing.
        squares: of objectives whose weight is measured, by alias, what `gradient_squares` gives;
            no term of the log.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        counting: Mapping[str, Tensor] | None = None,
        squares: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.values_of = dict(values)
        self.counting = dict(counting or {})
        self.squares = dict(squares or {})

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
        squares: dict[str, Tensor] = {}
        for part in parts:
            for alias, found in part.squares.items():
                squares[alias] = squares[alias] + found if alias in squares else found
        return cls(values, counting, squares)

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


@dataclass(frozen=True)
class Aligned:
    """What the objectives add to a batch's loss, one value per sample.

    Args:
        loss_B: weighted, scheduled and gated sum over objectives; carries the gradient.
        terms: unweighted terms by alias, for the log; without those that the schedule turned off.
        samples: by alias, which samples had something to align, bool (B,).
        weighted: what each objective adds to `loss_B`, by alias; carries the gradient.
        counted: of `samples`, those in which the objective trains something
            (`alignlab.training.aligned_samples`).
        features: mean magnitude of the features of each teacher and kind of token, (B,), by log
            name.
        watched: aliases of those that a plateau may stop.
        measured: by alias, the gated and unweighted loss of those whose weight is measured in this
            step; carries the gradient.
    """

    loss_B: Tensor
    terms: dict[str, Terms]
    samples: dict[str, Tensor]
    weighted: dict[str, Tensor]
    counted: dict[str, Tensor]
    features: dict[str, Tensor]
    watched: frozenset[str] = frozenset()
    measured: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """What is added to a flow loss that is a mean over the batch: the mean of `loss_B`."""
        return self.loss_B.mean()

    def sample_terms(
        self,
        first: Mapping[str, Tensor] | None = None,
        squares: Mapping[str, Tensor] | None = None,
    ) -> SampleTerms:
        """Every term by its log name, detached, (B,) each.

        In similarities, and in what plateaus watch, those samples count that had something to
        align; where none had, the names are the same all the same.

        Args:
            first: terms of the step that come before these.
            squares: as `SampleTerms` keeps them.
        """
        terms = {**(first or {}), **self.features}
        counting: dict[str, Tensor] = {}
        for alias, objective_terms in self.terms.items():
            loss_B, similarity_B = objective_terms.loss_B.detach(), objective_terms.similarity_B
            terms[f"loss/{alias}"] = loss_B
            terms[f"{ALIGNED}{alias}"] = self.counted[alias]
            terms |= {f"loss/{alias}/{part}": v for part, v in objective_terms.parts.items()}
            of_aligned = {} if similarity_B is None else {f"sim/{alias}": similarity_B}
            if objective_terms.centered_B is not None:
                of_aligned[f"sim/{alias}/centered"] = objective_terms.centered_B
            if alias in self.watched:
                watched_B = -loss_B if similarity_B is None else similarity_B
                if objective_terms.watched_B is not None:
                    watched_B = objective_terms.watched_B
                of_aligned[f"{WATCHED}{alias}"] = watched_B
            terms |= of_aligned
            counting |= dict.fromkeys(of_aligned, self.samples[alias])
        return SampleTerms(terms, counting, squares)

    def scalars(self) -> dict[str, Tensor]:
        """Means for a log, detached, on the device: `loss/<alias>` (unweighted) and its parts,
        `sim/<alias>` and `sim/<alias>/centered`, `aligned/<alias>` (the share of samples) and
        `features/<teacher>/<kind>`.

        NaN where no sample counts, such as the similarity of a batch without references.
        """
        terms = self.sample_terms()
        names = [name for name in terms if not name.startswith(WATCHED)]
        if not names:
            return {}
        sums, counts = terms.sums(names)
        return dict(zip(names, sums / counts, strict=True))


def feature_magnitudes(features: Mapping[tuple[str, str], Features]) -> dict[str, Tensor]:
    """Mean magnitude of a sample's features, (B,): not finite if one of them is not.

    Tokens of zeros are left out: they fill up samples with fewer references than others.
    """
    means = {}
    for (alias, kind), found in features.items():
        x_BTPD = found.tokens_BTPD
        # a norm, which keeps no copy of the features in fp32
        sums_BTP = torch.linalg.vector_norm(x_BTPD, ord=1, dim=-1, dtype=torch.float32)
        count_B = (sums_BTP != 0).flatten(1).sum(1).clamp_min(1) * x_BTPD.shape[-1]
        means[f"{FEATURES}{alias}/{kind}"] = sums_BTP.flatten(1).sum(1) / count_B
    return means


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
        self,
        terms: SampleTerms,
        norm: Tensor,
        settings: Mapping[str, float | Tensor],
        ranks: Ranks,
    ) -> None:
        self._terms = terms
        self._norm = norm
        self._settings = settings
        self._ranks = ranks

    @cached_property
    def _scalars(self) -> dict[str, Tensor]:
        exact = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in self._settings.items()}
        return self._ranks.means(self._terms) | {"grad/norm": self._norm} | exact

    def __getitem__(self, name: str) -> Tensor:
        return self._scalars[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scalars)

    def __len__(self) -> int:
        return len(self._scalars)
