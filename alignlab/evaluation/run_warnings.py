"""Alarms about generated clips that are washed out, or too strong, beside real ones."""

import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)

# Ours; no threshold is published. In 27 runs of nine variants of the committed comparisons, 12
# clips each, clips kept 0.72 to 1.02 of the contrast and 0.97 to 1.30 of the colourfulness. Those
# of the base model, which has never seen references and makes pale clips of them, kept 0.52 of it.
KEPT = 2 / 3
# Clips differ: of so many of the same runs' clips, 1 in 40 sets keeps less contrast than that by
# chance; of two, 1 in 11.
MIN_CLIPS = 4
# Below these there is nothing to lose: five grey levels of 255 (ours), and what people call
# slightly colourful.
LEAST = {"contrast": 0.02, "colourfulness": 15.0}


def sample_alarms(metrics: Mapping[str, float], clips: int) -> list[str]:
    """Warns of a lost or an overdone contrast or colourfulness of generated clips.

    They are held against the real clips with the same captions, after the same autoencoder: an
    alarm is raised below 2/3 of theirs, or above 3/2. The base model is no measure: it may well be
    the pale one.

    Args:
        metrics: `gen/...` and `gen_real/...` are read.
        clips: number of clips that were judged; with fewer than four there is no alarm.

    Returns:
        One note per alarm, its numbers in brackets at the end.
    """
    notes = []
    for name, least in LEAST.items():
        shown, real = metrics.get(f"gen/{name}"), metrics.get(f"gen_real/{name}")
        if shown is None or real is None or real < least or clips < MIN_CLIPS:
            continue
        if KEPT <= shown / real <= 1 / KEPT:
            continue
        notes.append(f"{_what(name, shown < real)} [{shown:.3g} of {real:.3g}]")
        log.warning("%s", notes[-1])
    return notes


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
