"""The tables of metrics: what each is called, which way is better, and what computes it.

A metric is one row. `result.json` names it by its key: `<name>/block<i>` and `<name>/mean` for
tokens, `gen/<name>` and `gen_real/<name>` for clips. Rows are measured in the order of their table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignlab.evaluation import generation_metrics as clips
from alignlab.evaluation import token_metrics as tokens

Direction = Literal["lower", "higher", "none"]
Need = Literal[
    "references",
    "two references",
    "image teacher",
    "any teacher",
    "two frames",
    "two clips",
    "subjects by colour",
]
"""What a recipe must have for a metric to be measured at all (`measured_names.needs_met`)."""


@dataclass(frozen=True)
class Metric:
    """What every row says.

    Args:
        label: what a reader calls it.
        unit: of its values; empty for a share, a cosine or another pure number.
        better: which way is better; "none" where neither is, or where it depends.
        headline: among the few that are looked at first.
        needs: without which no run of a recipe measures it. With them a run still may not: a clip
            that shows no subject alone has none to confuse.
    """

    label: str
    unit: str = ""
    better: Direction = "none"
    headline: bool = False
    needs: tuple[Need, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReferenceMetric(Metric):
    """A metric of the reference tokens of one block.

    Args:
        measure: of tokens; None where it cannot be measured.
        within_clip: each clip at each noise level is measured by itself, and the metric is the mean
            over them; else those of all clips and levels are measured together.
        by_block: False for what is the same in every block: one value, without a part in its name.
    """

    measure: Callable[[tokens.ReferenceTokens], float | None]
    within_clip: bool = False
    by_block: bool = True


@dataclass(frozen=True, kw_only=True)
class VideoMetric(Metric):
    """A metric of the video tokens of one block: mean over noise levels.

    Args:
        measure: of the tokens of all clips at one noise level.
    """

    measure: Callable[[tokens.VideoTokens], float]


def mean(values: Sequence[float]) -> float:
    """The mean of everything that was measured."""
    return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class GenerationMetric(Metric):
    """A metric of generated clips.

    Args:
        measure: what one clip adds; empty where the clip cannot be measured.
        reduce: of what all clips have added, which is not nothing; None leaves the metric out.
    """

    measure: Callable[[clips.GeneratedClip], Sequence[Any]]
    reduce: Callable[[Sequence[Any]], float | None] = mean


# `evaluate.validation_flow` computes it, and its parts `/t0` to `/t9`.
VALIDATION_METRICS: dict[str, Metric] = {
    "val/flow": Metric("validation flow loss", better="lower", headline=True),
}

REFERENCE_METRICS: dict[str, ReferenceMetric] = {
    "silhouette": ReferenceMetric(
        "subject silhouette",
        better="higher",
        headline=True,
        needs=("two references",),
        measure=tokens.subject_silhouette,
        within_clip=True,
    ),
    "cross_cos": ReferenceMetric(
        "cross-subject cosine",
        better="lower",
        headline=True,
        needs=("two references",),
        measure=tokens.cross_cosine,
        within_clip=True,
    ),
    "teacher_retrieval": ReferenceMetric(
        "retrieval in teacher space",
        better="higher",
        headline=True,
        needs=("references", "image teacher", "two clips"),
        measure=tokens.retrieval_by_teacher,
    ),
    "teacher_retrieval_chance": ReferenceMetric(
        "retrieval in teacher space by chance",
        needs=("references", "image teacher", "two clips"),
        measure=tokens.retrieval_by_chance,
        by_block=False,
    ),
}

# Agreement with the teacher is what an alignment loss trains, not a goal in itself: no direction.
VIDEO_METRICS: dict[str, VideoMetric] = {
    "cknna": VideoMetric("CKNNA to teacher", measure=tokens.agreement),
}

# Motion makes frames differ as flicker does: neither has a better side. Nor have contrast and
# colourfulness: those of the real clips are right.
GENERATION_METRICS: dict[str, GenerationMetric] = {
    "contrast": GenerationMetric("RMS contrast", measure=clips.contrast),
    "colourfulness": GenerationMetric("colourfulness (Hasler and Süsstrunk)", measure=clips.colour),
    "colour_cast": GenerationMetric(
        "colour cast (CIELAB difference)",
        unit="CIE 1976 difference",
        better="lower",
        measure=clips.lab_gap,
        reduce=clips.norm_of_mean,
    ),
    "flicker": GenerationMetric(
        "temporal flickering score (VBench)", needs=("two frames",), measure=clips.flicker
    ),
    "motion_amplitude": GenerationMetric(
        "motion amplitude (OpenS2V)",
        unit="pixels per frame",
        needs=("two frames",),
        measure=clips.motion,
    ),
    "copy_paste_proxy": GenerationMetric(
        "copy-paste (proxy)",
        better="lower",
        headline=True,
        needs=("references",),
        measure=clips.pasted,
    ),
    "found_proxy": GenerationMetric(
        "named subjects shown (proxy)",
        better="higher",
        needs=("subjects by colour",),
        measure=clips.subjects_shown,
    ),
    "entities_proxy": GenerationMetric(
        "entities too many or too few (proxy)",
        unit="parts per frame",
        better="lower",
        needs=("subjects by colour",),
        measure=clips.entities_off,
    ),
    "motion_proxy": GenerationMetric(
        "motion as captioned (proxy)",
        better="higher",
        needs=("two frames", "subjects by colour"),
        measure=clips.moves_as_captioned,
    ),
    "reference_match_proxy": GenerationMetric(
        "best match of a reference (proxy)",
        better="higher",
        needs=("references", "image teacher"),
        measure=clips.reference_match,
    ),
    "confusion_proxy": GenerationMetric(
        "subject confusion (proxy)",
        better="lower",
        headline=True,
        needs=("two references", "image teacher", "subjects by colour"),
        measure=clips.confusion,
    ),
    "identity_proxy": GenerationMetric(
        "subject identity (proxy)",
        better="higher",
        headline=True,
        needs=("references", "image teacher", "subjects by colour"),
        measure=clips.identity,
    ),
    "frechet": GenerationMetric(
        "Fréchet distance of frames",
        better="lower",
        needs=("any teacher",),
        measure=clips.frame_features,
        reduce=clips.frechet,
    ),
}

# Of the tiny base model (`alignlab.tiny_models.quality`), and of no run: they need probes that are
# fitted to the teacher on hundreds of clips, and a teacher that knows the world of `shapes`.
NAMED_SUBJECT_METRICS: dict[str, GenerationMetric] = {
    "named_color": GenerationMetric(
        "named subjects of the right colour", better="higher", measure=clips.named_color
    ),
    "named_motion": GenerationMetric(
        "named subjects that move as captioned", better="higher", measure=clips.named_motion
    ),
    "named_texture": GenerationMetric(
        "named subjects of the right texture", better="higher", measure=clips.named_texture
    ),
    "named_shape": GenerationMetric(
        "named subjects of the right shape", better="higher", measure=clips.named_shape
    ),
    "named_all": GenerationMetric(
        "named subjects with all four right", better="higher", measure=clips.named_all
    ),
}

# What a run measures, by the name without prefix or part.
METRICS: dict[str, Metric] = {
    **VALIDATION_METRICS,
    **REFERENCE_METRICS,
    **VIDEO_METRICS,
    **{f"gen/{name}": metric for name, metric in GENERATION_METRICS.items()},
}
