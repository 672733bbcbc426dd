"""How well the tokens of a block agree with a teacher, and tell subjects apart.

Each public function is the `measure` of a row in `metric_registry.py`: it takes the tokens of one
block and the teacher's of the same places, and gives one number, or None where it cannot be
measured. Shape letters: N tokens, D student width, E teacher width.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from alignlab.metrics import (
    Neighbours,
    cknna_of,
    cross_subject_cosine,
    retrieval_chance,
    silhouette,
    teacher_retrieval,
)

CKNNA_K = 10  # REPA's
MIN_TOKENS = 4  # of which CKNNA has an estimate


@dataclass(frozen=True)
class ReferenceTokens:
    """Foreground reference tokens of a block, clip by clip and reference by reference.

    Args:
        student_ND: the block's tokens.
        teacher_NE: the teacher's tokens of the same places; None for a video teacher.
        subjects_N: which of `names` a token shows.
        clips_N: position of the token's clip in the val split.
        names: of the subjects.
    """

    student_ND: Tensor
    teacher_NE: Tensor | None
    subjects_N: Tensor
    clips_N: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class TeacherTokens:
    """A teacher's tokens, `(N, E)`, which those of several blocks are compared with."""

    tokens_NE: Tensor

    @cached_property
    def neighbours(self) -> Neighbours:
        """Looked for once, whatever number of blocks reads them."""
        return Neighbours.of(self.tokens_NE, CKNNA_K, name="teacher_NE")


@dataclass(frozen=True)
class VideoTokens:
    """Video tokens of a block at one noise level, `(N, D)`, and the teacher's of those places."""

    student_ND: Tensor
    teacher: TeacherTokens


def subject_silhouette(tokens: ReferenceTokens) -> float | None:
    """Cosine silhouette of the subjects; None of fewer than two."""
    if len(tokens.subjects_N.unique()) < 2:
        return None
    return silhouette(tokens.student_ND, tokens.subjects_N)


def cross_cosine(tokens: ReferenceTokens) -> float | None:
    """Mean positive cosine between tokens of different subjects; None of fewer than two."""
    if len(tokens.subjects_N.unique()) < 2:
        return None
    return cross_subject_cosine(tokens.student_ND, tokens.subjects_N)


def retrieval_by_teacher(tokens: ReferenceTokens) -> float | None:
    """Share of tokens that, mapped linearly to the teacher's space, are nearest to their subject.

    The map is fitted on even clips and tested on odd ones. A token's own teacher token is in the
    gallery: most subjects have one image, and another could not be asked for. None for a video
    teacher, and without both kinds of clips.
    """
    fit_N = _fit_tokens(tokens)
    if fit_N is None or tokens.teacher_NE is None:
        return None
    return teacher_retrieval(
        tokens.student_ND[fit_N],
        tokens.teacher_NE[fit_N],
        tokens.student_ND[~fit_N],
        tokens.teacher_NE[~fit_N],
        tokens.subjects_N[~fit_N],
    )


def retrieval_by_chance(tokens: ReferenceTokens) -> float | None:
    """What guessing would reach in `retrieval_by_teacher`."""
    fit_N = _fit_tokens(tokens)
    if fit_N is None or tokens.teacher_NE is None:
        return None
    return retrieval_chance(tokens.subjects_N[~fit_N], tokens.subjects_N[~fit_N])


def agreement(tokens: VideoTokens) -> float:
    """CKNNA (k = 10) of the tokens with the teacher's."""
    student = Neighbours.of(tokens.student_ND, CKNNA_K, name="student_ND")
    return cknna_of(student, tokens.teacher.neighbours)


def _fit_tokens(tokens: ReferenceTokens) -> Tensor | None:
    """Those of even clips; None where all are, or fewer than two, which fit no map."""
    fit_N = tokens.clips_N % 2 == 0
    return None if fit_N.all() or fit_N.sum() < 2 else fit_N
