"""A page that shows how a recipe's teachers see its clips: teachers.html, which needs no network.

Shape letters: T frames, H, W pixels, C colours, P patches of a frame.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignlab.data.sample import Sample
from alignlab.evaluation.feature_maps import pca_colours
from alignlab.evaluation.teacher_score import TeacherScore
from alignlab.experiments.charts.chart import Chart
from alignlab.experiments.charts.heat import heat_map
from alignlab.experiments.charts.lines import Line, line_figure
from alignlab.experiments.charts.look import Style, styles
from alignlab.experiments.probe.teacher_table import score_rows
from alignlab.experiments.probe.tokens import Table, decimals
from alignlab.experiments.report.page import data_uri, render
from alignlab.metrics.frequency import BANDS
from alignlab.runs.atomic_files import write_text

SHOWN_CLIPS = 6
_SIDE = 160  # pixels of a picture's longer side, at least

Pairs = Mapping[tuple[str, str], float]


def write_page(
    scores: Sequence[TeacherScore],
    clips: Sequence[Sample],
    pairs: Pairs,
    out: Path,
    *,
    name: str,
) -> None:
    """Writes the page.

    Args:
        scores: of the teachers, on these clips.
        clips: as many as were scored.
        pairs: CKA of every two teachers (`alignlab.evaluation.teacher_pairs`).
        out: the file.
        name: of the recipe.
    """
    by_name = styles([score.alias for score in scores])
    sections: dict[str, list[Chart | None]] = {
        "curves": [_frequency(scores, by_name), _iicr(scores, by_name)],
        "pairs": [_pairs(list(by_name), pairs)] if pairs else [],
    }
    page = render(
        "teachers.html.j2",
        {name: [c for c in charts if c is not None] for name, charts in sections.items()},
        list(by_name.values()),
        name=name,
        clips=len(clips),
        lead=lead(scores, pairs),
        names=list(by_name),
        table=Table("Scores", ("", *by_name), tuple(score_rows(scores))),
        pictures=_pictures(clips[:SHOWN_CLIPS], scores),
        device="a GPU" if torch.cuda.is_available() else "a CPU",
    )
    write_text(out, page)


def lead(scores: Sequence[TeacherScore], pairs: Pairs) -> list[str]:
    """One sentence per question that the page answers."""
    if len(scores) < 2:
        return ["One teacher: name several in the recipe to compare them."]
    sentences = []
    both = [k for k in scores[0].iicr if all(k in score.iicr for score in scores)]
    if both:
        values = {score.alias: round(score.iicr[both[0]], 3) for score in scores}
        best = max(values.values())
        names = ", ".join(alias for alias, value in values.items() if value == best)
        sentences.append(
            f"Tells clips apart best: {names} (IICR-like {both[0]}: {decimals(best)}; by guessing "
            f"{decimals(scores[0].chance)})."
        )
    with_bands = [score for score in scores if score.frequency]
    if len(with_bands) > 1:
        finest = max(with_bands, key=lambda score: score.frequency[-1])
        coarsest = min(with_bands, key=lambda score: score.frequency[-1])
        sentences.append(
            f"Finest over the frame: {finest.alias} ({finest.frequency[-1]:.0%} of its power in "
            f"the highest band); coarsest: {coarsest.alias} ({coarsest.frequency[-1]:.0%})."
        )
    if len(pairs) > 1:
        apart = min(pairs, key=lambda pair: pairs[pair])
        sentences.append(
            f"Least alike, so the first candidates for a fusion: {apart[0]} and {apart[1]} "
            f"(CKA {decimals(pairs[apart])})."
        )
    quick = min(scores, key=lambda score: score.cost.seconds)
    slow = max(scores, key=lambda score: score.cost.seconds)
    sentences.append(
        f"Quickest: {quick.alias} ({quick.cost.seconds * 1000:,.0f} ms a clip); slowest: "
        f"{slow.alias} ({slow.cost.seconds * 1000:,.0f} ms)."
    )
    return sentences


def _frequency(scores: Sequence[TeacherScore], by_name: Mapping[str, Style]) -> Chart | None:
    middles = [(low + min(high, 1.0)) / 2 for low, high in BANDS]
    lines = [
        Line(by_name[s.alias], middles, s.frequency, s.frequency, s.frequency)
        for s in scores
        if s.frequency
    ]
    words = "share of a frame's spatial power in each of four bands; they sum to 1"
    return _lines("Frequency profile", words, lines, by_name, "frequency (1: from token to token)")


def _iicr(scores: Sequence[TeacherScore], by_name: Mapping[str, Style]) -> Chart | None:
    lines = [
        Line(by_name[s.alias], list(s.iicr), v, v, v)
        for s in scores
        if (v := list(s.iicr.values()))
    ]
    words = "share of a frame's k nearest frames that are of its own clip"
    return _lines("IICR-like", words, lines, by_name, "neighbours k")


def _lines(
    title: str, words: str, lines: list[Line], by_name: Mapping[str, Style], axis: str
) -> Chart | None:
    if not lines:
        return None
    numbers = {name: number for number, name in enumerate(by_name)}
    figure, readouts = line_figure(lines, numbers, axis, markers=True)
    return Chart(title, words, figure, readouts)


def _pairs(names: list[str], pairs: Pairs) -> Chart:
    both = dict(pairs) | {(other, one): value for (one, other), value in pairs.items()}
    values = [[both.get((row, column)) for column in names] for row in names]
    return heat_map(
        "CKA between teachers",
        values,
        (names, names),
        axes_titles=("teacher", "other teacher"),
        ends=(min(0.0, *pairs.values()), 1.0),
        caption="of the tokens of middle frames: 1: one says all of the other; 0: nothing",
    )


def _pictures(
    clips: Sequence[Sample], scores: Sequence[TeacherScore]
) -> list[tuple[str, list[str]]]:
    """Each clip's caption, its middle frame, and how each teacher sees that, as data URIs."""
    columns = [[_png(clip.video_THWC[len(clip.video_THWC) // 2]) for clip in clips]]
    for score in scores:
        frames = _colours(score)[: len(clips)]
        columns.append([_png(colours_PC.unflatten(0, score.grid[1:])) for colours_PC in frames])
    rows = zip(*columns, strict=True)
    return [(clip.caption, list(row)) for clip, row in zip(clips, rows, strict=True)]


def _colours(score: TeacherScore) -> list[Tensor]:
    """Three principal components of all clips' middle frames as colours, one projection for all."""
    tokens_PD = torch.cat(score.middle)
    (colours_PC,), _ = pca_colours([tokens_PD])
    return list(colours_PC.split([len(frame) for frame in score.middle]))


def _png(image_HWC: Tensor) -> str:
    """Enlarged by whole pixels: what is shown are tokens, not a smooth picture."""
    pixels = np.ascontiguousarray(image_HWC.numpy())
    times = max(1, -(-_SIDE // max(pixels.shape[:2])))
    picture = Image.fromarray(pixels.repeat(times, 0).repeat(times, 1))
    content = io.BytesIO()
    picture.save(content, "PNG")
    return data_uri(content.getvalue(), "image/png")
