"""Reference tokens one by one on a probe's page: their cosines, and where a t-SNE puts them.

Shape letters: N tokens, D width, E teacher width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.evaluation.probe import MODELS, RunProbe
from alignlab.evaluation.token_metrics import ReferenceTokens
from alignlab.experiments.charts.chart import Chart
from alignlab.experiments.probe.figures import scatter_chart, shown_subjects, similarity_charts
from alignlab.metrics import silhouette
from alignlab.metrics.features import unit_rows

MOST_CELLS = 150  # tokens on a side of a heat map
MOST_POINTS = 1000  # of a t-SNE


@dataclass(frozen=True)
class Table:
    """A plain table: head row, then rows that begin with their name."""

    label: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def decimals(value: float | None, sign: str = "") -> str:
    """Three decimals with a true minus sign; a dash for None. `sign` as in a format."""
    return "—" if value is None else f"{value:{sign}.3f}".replace("-", "\N{MINUS SIGN}")


def _sets(result: RunProbe, index_N: Tensor) -> dict[str, Tensor]:
    """Features of these reference tokens: before, after, and the teacher's."""
    sets = {model: tokens.student_ND[index_N] for model, tokens in result.tokens.items()}
    teacher_NE = result.tokens[MODELS[0]].teacher_NE
    return sets if teacher_NE is None else sets | {result.teacher: teacher_NE[index_N]}


def similarity_of(result: RunProbe) -> tuple[list[Chart], dict[str, str], Table | None]:
    """Heat maps of the first clip with several subjects, and mean cosines between them."""
    tokens = result.tokens.get(MODELS[0])
    index_N = None if tokens is None else _clip_of_several(tokens)
    if tokens is None or index_N is None:
        return [], {}, None
    subjects_N = tokens.subjects_N[index_N]
    index_N = _thinned(index_N[subjects_N.argsort(stable=True)], MOST_CELLS)
    subjects_N = tokens.subjects_N[index_N]
    sets = _sets(result, index_N)
    numbers = subjects_N.unique().tolist()
    letters = {chr(ord("A") + i): tokens.names[n] for i, n in enumerate(numbers)}
    pairs = [(i, j) for i in range(len(numbers)) for j in range(i, len(numbers))]
    rows = []
    for i, j in pairs:
        means = (
            _mean_cosine(features_ND, subjects_N == numbers[i], subjects_N == numbers[j])
            for features_ND in sets.values()
        )
        name = f"{chr(65 + i)} with {'itself' if i == j else chr(65 + j)}"
        rows.append((name, *map(decimals, means)))
    table = Table("Mean cosine between subjects", ("subjects", *sets), tuple(rows))
    return similarity_charts(sets, subjects_N), letters, table


def _thinned(index_N: Tensor, most: int) -> Tensor:
    """At most so many, evenly."""
    return index_N[:: math.ceil(len(index_N) / most)]


def _clip_of_several(tokens: ReferenceTokens) -> Tensor | None:
    for clip in tokens.clips_N.unique().tolist():
        index_N: Tensor = (tokens.clips_N == clip).nonzero()[:, 0]
        if len(tokens.subjects_N[index_N].unique()) > 1:
            return index_N
    return None


def _mean_cosine(features_ND: Tensor, left_N: Tensor, right_N: Tensor) -> float | None:
    """Over pairs of different tokens; None where a subject has one token."""
    unit_ND = unit_rows(features_ND.double())
    pairs_NN = (left_N[:, None] & right_N) & ~torch.eye(len(unit_ND), dtype=torch.bool)
    return float((unit_ND @ unit_ND.T)[pairs_NN].mean()) if pairs_NN.any() else None


def scatter_of(result: RunProbe) -> tuple[list[Chart], list[str], Table | None]:
    """t-SNE of up to eight subjects' tokens, and the silhouette behind each picture."""
    tokens = result.tokens.get(MODELS[0])
    if tokens is None:
        return [], [], None
    numbers = shown_subjects(tokens)
    if len(numbers) < 2:
        return [], [], None
    names = {number: tokens.names[number] for number in numbers}
    index_N = torch.isin(tokens.subjects_N, torch.tensor(numbers)).nonzero()[:, 0]
    index_N = _thinned(index_N, MOST_POINTS)
    subjects_N = tokens.subjects_N[index_N]
    sets = _sets(result, index_N)
    charts = [scatter_chart(title, x, subjects_N, names) for title, x in sets.items()]
    values = tuple(decimals(silhouette(x, subjects_N)) for x in sets.values())
    head = ("features of", *sets)
    label = f"silhouette of {len(index_N)} tokens"
    table = Table("Silhouette of the subjects shown", head, ((label, *values),))
    return charts, list(names.values()), table
