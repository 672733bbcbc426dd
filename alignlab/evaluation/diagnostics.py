"""What alignment does to a run while it trains: gradients, cosines, rank of the features.

Shape letters: B batch, L blocks, N tokens of all samples, D width.
"""

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from alignlab.evaluation.evaluate import denoise, eval_batch
from alignlab.evaluation.run_warnings import RANK, RankWarnings
from alignlab.metrics.rank import effective_rank
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.taps import BlockTokens
from alignlab.training.setup import Run
from alignlab.training.step_terms import Aligned

log = logging.getLogger(__name__)

RANK_SIGMA = 0.5
RANK_TOKENS = 1024  # tokens of which a rank is taken: its cost grows with their cube

Gradients = list[Tensor | None]
"""One per trained parameter of the transformer; None where the loss does not reach it."""

Forward = tuple[Tensor, Aligned]
"""Weighted flow loss of a micro-batch, (B,), and what the objectives give, with their graph."""


class Diagnosis:
    """Looks into a run before the first step and before every `every`-th. Logs, by alias and block:

    - `grad/<alias>/ratio`: norm of the objective's gradient over that of the flow loss, both as
      they enter the step (weighted, scheduled, gated, before clipping), on the trained parameters
      of the transformer that both reach: with an objective on block i, those up to block i
    - `grad/<alias>/cosine`: between the same two gradients; below 0 the objective works against
      the flow loss there. Left out where the objective's gradient is 0
    - `sim/<alias>/block<i>`: mean cosine of matching projected student and teacher tokens, of
      objectives that have such pairs (`sim/<alias>` is its mean over blocks)
    - `diag/rank/video/block<i>`, `diag/rank/reference/block<i>`: `effective_rank` of a block's
      tokens, over all clips and at most 1,024 evenly chosen tokens of the first `eval.batch_size`
      val clips at noise level 0.5, the same every time. Blocks are those of the objectives and
      `eval.blocks`, or all if neither names one
    - `diag/low_ranks`: how many of these are below half of their first value; each such feature is
      also warned of once, and noted in `result.json` (`RankWarnings`)

    It costs a forward pass of transformer and teachers on the step's batches, a backward pass of
    the flow loss, one of each objective, and a forward pass without gradients on the val clips; in
    memory, one gradient of the trained parameters for each loss. `time/step` leaves it out,
    `memory/peak_mib` does not. Nothing that is trained changes, and nothing is drawn.

    Args:
        run: `run.branch` is entered whenever the diagnosis is called.
        every: steps between two diagnoses.
        logged: what an interrupted run had logged, for the first ranks and the warnings given then.
    """

    def __init__(
        self,
        run: Run,
        *,
        every: int,
        logged: Iterable[Mapping[str, float]] = (),
    ) -> None:
        self._run, self._every = run, every
        self._warnings = RankWarnings(logged)
        transformer = run.wan.transformer
        blocks = {*run.alignment.blocks, *(run.config.eval.blocks or ())}
        self._branch = ReferenceBranch.of(
            transformer,
            run.config.model,
            blocks=sorted(blocks or range(len(transformer.blocks))),
        )

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from 1, is diagnosed before it is taken."""
        return step == 1 or step % self._every == 0

    def scalars(self, step: int, forwards: Iterable[Forward]) -> dict[str, float]:
        """Diagnoses a step, and warns of ranks that are low for the first time.

        Args:
            step: that is about to be taken, counted from 1.
            forwards: of the step's micro-batches, each made when it is asked for.
        """
        scalars = loss_gradients(self._run, forwards) | self._ranks()
        for text in self._warnings.see(step, scalars):
            log.warning("%s", text)
        return scalars | {"diag/low_ranks": float(self._warnings.low(scalars))}

    @torch.no_grad()
    def _ranks(self) -> dict[str, float]:
        run = self._run
        count = min(run.config.eval.batch_size, run.config.eval.clips, len(run.val_clips))
        clips = [run.val_clips[i] for i in range(count)]
        batch = eval_batch(run, clips, list(range(count)), [RANK_SIGMA] * count)
        with self._branch:
            taps = denoise(run, self._branch, batch, capture=True).taps
        return {
            f"{RANK}{kind}/block{block}": effective_rank(_thinned(tokens_ND))
            for block, tokens in taps.items()
            for kind, tokens_ND in _by_kind(tokens).items()
        }


def loss_gradients(run: Run, forwards: Iterable[Forward]) -> dict[str, float]:
    """`grad/<alias>/ratio`, `grad/<alias>/cosine` and `sim/<alias>/block<i>` of a step.

    Gradients are of the sum over the micro-batches, as the step's are; see `Diagnosis`.
    """
    trained = [p for p in run.wan.transformer.parameters() if p.requires_grad]
    flow: Gradients = [None] * len(trained)
    others: dict[str, Gradients] = {}
    cosines: dict[str, list[Tensor]] = {}
    for flow_B, aligned in forwards:
        _add(flow, flow_B, trained)
        for alias, loss_B in aligned.weighted.items():
            _add(others.setdefault(alias, [None] * len(trained)), loss_B, trained)
        for alias, terms in aligned.terms.items():
            if terms.similarity_LB is not None:
                for block, similarity_B in zip(
                    run.config.objectives[alias].blocks, terms.similarity_LB, strict=True
                ):
                    counted_B = similarity_B[aligned.samples[alias]]
                    cosines.setdefault(f"sim/{alias}/block{block}", []).append(counted_B)
    scalars: dict[str, float] = {}
    run.ranks.average(flow, trained)
    for alias, gradients in others.items():
        run.ranks.average(gradients, trained)
        ratio, cosine = gradient_ratio(flow, gradients)
        scalars[f"grad/{alias}/ratio"] = ratio
        if cosine is not None:
            scalars[f"grad/{alias}/cosine"] = cosine
    means = run.ranks.means({key: torch.cat(values) for key, values in cosines.items()})
    return scalars | {key: float(value) for key, value in means.items()}


def gradient_ratio(flow: Gradients, other: Gradients) -> tuple[float, float | None]:
    """Norm of `other` over that of `flow`, and their cosine, where both are not None.

    The cosine is None where one of the norms is 0, and the ratio infinite where only the flow's is.
    """
    pairs = [(f, o) for f, o in zip(flow, other, strict=True) if f is not None and o is not None]
    norms = [math.sqrt(sum(_dot(x, x) for x in side)) for side in zip(*pairs, strict=True)]
    flow_norm, other_norm = norms or (0.0, 0.0)
    if other_norm == 0:
        return 0.0, None
    if flow_norm == 0:
        return math.inf, None
    return other_norm / flow_norm, sum(_dot(f, o) for f, o in pairs) / (flow_norm * other_norm)


def _dot(left: Tensor, right: Tensor) -> float:
    return float(left.flatten().double() @ right.flatten().double())


def _add(total: Gradients, loss_B: Tensor, trained: list[Tensor]) -> None:
    """Adds the gradient of the batch's mean loss; `.grad` is left alone, and so is the graph."""
    if not loss_B.requires_grad:
        return
    gradients = torch.autograd.grad(loss_B.mean(), trained, retain_graph=True, allow_unused=True)
    for place, gradient in enumerate(gradients):
        before = total[place]
        if gradient is not None:
            total[place] = gradient if before is None else before + gradient


def _by_kind(tokens: BlockTokens) -> dict[str, Tensor]:
    """Video tokens and reference tokens of all samples, without padding, (N, D) each."""
    ids_BN = tokens.reference.subject_ids_BN
    assert ids_BN is not None  # reference tokens always carry ids
    sets = {
        "video": tokens.video.tokens_BND.flatten(0, 1),
        "reference": tokens.reference.tokens_BND[ids_BN >= 0],
    }
    return {kind: tokens_ND.float() for kind, tokens_ND in sets.items() if len(tokens_ND)}


def _thinned(tokens_ND: Tensor) -> Tensor:
    step = math.ceil(len(tokens_ND) / RANK_TOKENS)
    return tokens_ND[::step]
