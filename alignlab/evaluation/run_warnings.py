"""What a run gives warning of: divergence, idle objectives, washed-out clips, collapse.

A warning is one text, its numbers in brackets at the end. It is logged, and kept in `notes` of
`result.json`.
"""

import logging
import math
from collections.abc import Iterable, Mapping

from alignlab.progress import warn_once
from alignlab.training.aligned_samples import AlignedCount

log = logging.getLogger(__name__)

# Ours; no threshold is published. In 27 runs of nine recipes, 12 clips each, clips kept 0.72 to
# 1.02 of the contrast and 0.97 to 1.30 of the colourfulness. Those of the base model, which has
# never seen references and makes pale clips of them, kept 0.52 of it.
KEPT = 2 / 3
# Clips differ: of so many of the same runs' clips, 1 in 40 sets keeps less contrast than that by
# chance; of two, 1 in 11.
MIN_CLIPS = 4
# Below these there is nothing to lose: five grey levels of 255 (ours), and what people call
# slightly colourful.
LEAST = {"contrast": 0.02, "colourfulness": 15.0}
RANK_SHARE = 0.5  # ours: no published threshold
RANK = "diag/rank/"
# `evaluate.flow_of_first_clips` before the first step; in the first row of the log.
START_FLOW = "start/val_flow"
# Ours. A training that is of use lowers it; what alignment costs of it stays far below that.
DIVERGED = 2.0
# Ours: how much smaller than possible a share may be without a word, beside four standard
# deviations of what chance does to it.
SHARE_LACKING = 0.95


def divergence_warnings(rows: Iterable[Mapping[str, float]], end: float) -> list[str]:
    """Warns of a validation loss that ended at more than twice its start, and logs it.

    Args:
        rows: of the log; the first one has `start/val_flow`, but for runs of older versions.
        end: the same after the last step.
    """
    start = next((row[START_FLOW] for row in rows if START_FLOW in row), math.nan)
    if not end > DIVERGED * start:
        return []
    text = (
        f"DIVERGED: the validation flow loss ended at more than {DIVERGED:g} times its start: "
        "lower optim.lr or the weights of objectives; nothing that was measured of this run says "
        f"anything of its objectives [{end:.3g} from {start:.3g}]"
    )
    log.warning("%s", text)
    return [text]


def alignment_warnings(counts: Mapping[str, AlignedCount]) -> list[str]:
    """Warns of objectives that had nothing to align in samples where their recipe lets them.

    Dropped references and a gate are the recipe's own; data without references, blank ones, empty
    masks are not.

    Args:
        counts: by alias, of the whole run.
    """
    texts = []
    for alias, count in counts.items():
        if not count.is_trained:
            texts.append(f"objectives.{alias} has weight 0: it was measured, and trained nothing")
        elif not count.samples:
            continue
        elif count.aligned == 0:
            texts.append(
                f"objectives.{alias} had nothing to align in any sample, and trained nothing "
                f"[{count.samples:,} samples]"
            )
        elif count.share < SHARE_LACKING * count.possible - 4 * _deviation(count):
            texts.append(
                f"objectives.{alias} had nothing to align in some samples where its recipe lets "
                "it: look for clips without references, blank references, empty masks "
                f"[{count.share:.1%} of {count.samples:,} samples, {count.possible:.1%} possible]"
            )
    for text in texts:
        warn_once(text)  # those of a weight of 0 are the same for every seed
    return texts


def _deviation(count: AlignedCount) -> float:
    return math.sqrt(count.possible * (1 - count.possible) / count.samples)


def nonfinite_warnings(metrics: Mapping[str, float]) -> list[str]:
    """Warns of metrics that are not finite, and logs it; reports and sweeps leave them out."""
    names = [name for name, value in metrics.items() if not math.isfinite(value)]
    if not names:
        return []
    text = f"not finite, and so in no mean or test: {', '.join(names)}"
    log.warning("%s", text)
    return [text]


def sample_warnings(metrics: Mapping[str, float], clips: int) -> list[str]:
    """Warns of a lost or an overdone contrast or colourfulness of generated clips, and logs it.

    They are held against the real clips with the same captions, after the same autoencoder: below
    2/3 of theirs, or above 3/2, there is a warning. The base model is no measure: it may well be
    the pale one.

    Args:
        metrics: `gen/...` and `gen_real/...` are read.
        clips: number of clips that were measured; of fewer than four there is no warning.
    """
    texts = []
    for name, least in LEAST.items():
        shown, real = metrics.get(f"gen/{name}"), metrics.get(f"gen_real/{name}")
        if shown is None or real is None or real < least or clips < MIN_CLIPS:
            continue
        if KEPT <= shown / real <= 1 / KEPT:
            continue
        texts.append(f"{_what(name, shown < real)} [{shown:.3g} of {real:.3g}]")
        log.warning("%s", texts[-1])
    return texts


def _what(name: str, is_less: bool) -> str:
    if is_less:
        return (
            f"generated clips have less than {KEPT:.0%} of the real clips' {name}: they are washed "
            "out, or lack subjects"
        )
    return (
        f"generated clips have more than {1 / KEPT:.0%} of the real clips' {name}: lower "
        "eval.text_guidance or eval.reference_guidance"
    )


class RankWarnings:
    """Effective ranks that fell below half of their first value: collapse, or washed-out features.

    Args:
        logged: scalars by step so far, in order; `diag/rank/...` is read.

    `texts` holds all warnings, in order.
    """

    def __init__(self, logged: Iterable[Mapping[str, float]] = ()) -> None:
        self._first: dict[str, float] = {}
        self._low: set[str] = set()
        self.texts: list[str] = []
        for scalars in logged:
            self.see(int(scalars["step"]), scalars)

    def see(self, step: int, scalars: Mapping[str, float]) -> list[str]:
        """Takes a diagnosis, and warns of each feature that is low for the first time."""
        new = []
        for key, value in scalars.items():
            if not key.startswith(RANK):
                continue
            first = self._first.setdefault(key, value)
            if key in self._low or value >= RANK_SHARE * first:
                continue
            self._low.add(key)
            kind, block = key.removeprefix(RANK).split("/block")
            new.append(
                f"the effective rank of the {kind} tokens of block {block} fell under "
                f"{RANK_SHARE:.0%} of its first value: the features may be collapsing; lower the "
                "objective's weight, or stop it earlier (schedule) "
                f"[{value:.3g} of {first:.3g} at step {step}]"
            )
        self.texts += new
        return new

    def low(self, scalars: Mapping[str, float]) -> int:
        """How many ranks of a diagnosis that was seen are low."""
        return sum(
            value < RANK_SHARE * self._first[key]
            for key, value in scalars.items()
            if key.startswith(RANK)
        )
