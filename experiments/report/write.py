"""Writes the report of a comparison: report.html, report.md, table.csv and table.tex.

Of runs that were evaluated while they trained there is steps.csv as well, and noise_floor.csv where
the baseline was trained twice.

`figures/` has every chart as SVG and PDF. report.html is one file that needs no network: style,
script, charts and clips are inside it, and a content security policy forbids the browser to fetch
anything.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignlab.experiments.charts.chart import Chart, save_pdf
from alignlab.experiments.compare.result import Comparison, SampleClip
from alignlab.experiments.report.by_step import steps_csv
from alignlab.experiments.report.charts import (
    block_charts,
    curve_charts,
    level_charts,
    step_charts,
    timestep_charts,
    variant_styles,
)
from alignlab.experiments.report.cost_charts import cost_charts
from alignlab.experiments.report.findings import judge
from alignlab.experiments.report.forest import forest_charts, forest_figure
from alignlab.experiments.report.formatting import format_number, format_p
from alignlab.experiments.report.latex import table_tex
from alignlab.experiments.report.matrix import SIGNS, matrix_of
from alignlab.experiments.report.noise_floor import HEADER, READING, noise_floor, noise_floor_csv
from alignlab.experiments.report.page import data_uri, render
from alignlab.experiments.report.run_warnings import warnings_by_variant
from alignlab.experiments.report.statistics import MIN_PAIRS
from alignlab.experiments.report.summary import (
    SummaryRow,
    by_metric,
    footnotes,
    summary_rows,
)
from alignlab.experiments.report.text import (
    as_text,
    budget_text,
    facts,
    headline,
    markdown,
    reading,
    setting_table,
    table_csv,
    title,
)
from alignlab.experiments.report.tuning import HEADER as SEARCHED_HEADER
from alignlab.experiments.report.tuning import searched_settings, spent_facts
from alignlab.experiments.report.tuning_charts import tuning_charts
from alignlab.experiments.report.verdict import verdict
from alignlab.runs.atomic_files import write_text


@dataclass(frozen=True)
class Prompt:
    """One validation prompt: files as data URIs, None for a clip or file that is not there."""

    caption: str
    references: tuple[str, ...]
    real: str | None
    clips: dict[str, str | None]


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write report.html, report.md and the tables as files; return the first's path.

    Args:
        comparison: the results; their `run_dir` is relative to `folder`.
        folder: existing folder.
    """
    rows = summary_rows(comparison)
    sections = _sections(comparison, rows)
    path = folder / "report.html"
    texts = {
        folder / "report.md": markdown(comparison, rows),
        folder / "table.csv": table_csv(comparison, rows),
        folder / "table.tex": table_tex(comparison, rows),
        path: _html(comparison, rows, sections, folder),
    }
    steps = folder / "steps.csv"
    if any(run.measured for run in comparison.results):
        texts[steps] = steps_csv(comparison)
    else:
        steps.unlink(missing_ok=True)  # of an earlier report
    floor, floor_csv = noise_floor(comparison, rows), folder / "noise_floor.csv"
    if floor is not None:
        texts[floor_csv] = noise_floor_csv(comparison, floor)
    else:
        floor_csv.unlink(missing_ok=True)
    write_figures(comparison, rows, sections, folder / "figures")
    for file, text in texts.items():  # each is whole, also where two commands write it
        write_text(file, text, shared=True)
    return path


def write_figures(
    comparison: Comparison,
    rows: list[SummaryRow],
    sections: Mapping[str, Sequence[Chart]],
    folder: Path,
) -> None:
    """The charts as files for papers: SVG of each, and all of them as pages of charts.pdf.

    A file's name begins with its page. forest.svg and forest.pdf have all panels of the forest plot
    in one figure. Those of an earlier report go, and nothing else of the folder.
    """
    folder.mkdir(exist_ok=True)
    written = set()
    charts = [(section, chart) for section, many in sections.items() for chart in many]
    whole = forest_figure(comparison, rows)
    if whole is not None:
        write_text(folder / "forest.svg", Chart("", "", whole).svg, shared=True)
        save_pdf([whole], folder / "forest.pdf")
        written |= {"forest.svg", "forest.pdf"}
    for page, (section, chart) in enumerate(charts, start=1):
        name = f"{page:02d}-{section}-{_slug(chart.title)}.svg"
        write_text(folder / name, chart.svg, shared=True)
        written.add(name)
    if charts:
        save_pdf([chart.figure for _, chart in charts], folder / "charts.pdf")
        written.add("charts.pdf")
    sections_named = "|".join(sections)
    own = re.compile(rf"\d\d+-(?:{sections_named})-[a-z0-9-]*\.svg|forest\.(?:svg|pdf)|charts\.pdf")
    for file in folder.iterdir():
        if own.fullmatch(file.name) and file.name not in written:
            file.unlink()


def _slug(text: str) -> str:
    """Letters, digits and hyphens of a title: a file's name on any system."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:60]


def _sections(comparison: Comparison, rows: list[SummaryRow]) -> dict[str, list[Chart]]:
    return {
        "forest": forest_charts(comparison, rows),
        "cost": cost_charts(comparison, rows),
        "steps": step_charts(comparison),
        "levels": level_charts(comparison),
        "curves": curve_charts(comparison),
        "timesteps": timestep_charts(comparison, rows),
        "blocks": block_charts(comparison, rows),
        "tuning": tuning_charts(comparison),
    }


def _html(
    comparison: Comparison,
    rows: list[SummaryRow],
    sections: Mapping[str, Sequence[Chart]],
    folder: Path,
) -> str:
    return render(
        "report.html.j2",
        sections,
        list(variant_styles(comparison).values()),
        comparison=comparison,
        matrix=matrix_of(comparison, rows),
        signs=SIGNS,
        finding=judge(comparison, rows),
        verdict=verdict(comparison, rows),
        noise_floor=noise_floor(comparison, rows),
        floor_header=HEADER,
        floor_reading=READING,
        warnings=warnings_by_variant(comparison),
        reading=reading(comparison),
        min_pairs=MIN_PAIRS,
        has_target=any(row.target is not None for row in rows),
        headline=headline(rows),
        groups=by_metric(rows),
        footnotes=footnotes(comparison, rows),
        budget=_budget(comparison),
        settings=setting_table(comparison, comparison.differing),
        tuning=setting_table(comparison, spent_facts(comparison)),
        searched=searched_settings(comparison),
        searched_header=SEARCHED_HEADER,
        prompts=_prompts(comparison, folder),
        facts=facts(comparison),
        environment={name: as_text(value) for name, value in comparison.environment.items()},
        title=title,
        format_number=format_number,
        format_p=format_p,
    )


def _budget(comparison: Comparison) -> str:
    if not comparison.results:
        return "No run has finished."
    if comparison.budget is not None:
        text = budget_text(comparison.budget)
        return f"{text[0].upper()}{text[1:]}; decided before training (budget.json)."
    steps = sorted({run.steps for run in comparison.results})
    if len(steps) == 1:
        return f"All {len(comparison.results)} runs took {steps[0]:,} steps."
    taken = {
        variant: sorted({run.steps for run in comparison.results if run.variant == variant})
        for variant in comparison.variants
    }
    listed = "; ".join(
        f"{variant}: {', '.join(f'{count:,}' for count in counts) or 'none'}"
        for variant, counts in taken.items()
    )
    return f"Runs did not take the same number of steps: {listed}."


def _prompts(comparison: Comparison, folder: Path) -> list[Prompt]:
    """Validation prompts of the first seed's samples, in the order the runs give them."""
    by_prompt: dict[str, dict[str, tuple[Path, SampleClip]]] = {}
    for variant in comparison.variants:
        run = comparison.run(variant, comparison.seeds[0])
        if run is not None:
            for clip in run.samples:
                by_prompt.setdefault(clip.key, {})[variant] = (folder / run.run_dir, clip)
    return [_prompt(comparison, clips) for clips in by_prompt.values()]


def _prompt(comparison: Comparison, clips: dict[str, tuple[Path, SampleClip]]) -> Prompt:
    home, first = next(iter(clips.values()))
    references = (_media_uri(home / name, "image/png") for name in first.references)
    return Prompt(
        caption=first.caption,
        references=tuple(uri for uri in references if uri is not None),
        real=_media_uri(home / first.real, "video/mp4") if first.real else None,
        clips={
            variant: _media_uri(clips[variant][0] / clips[variant][1].video, "video/mp4")
            if variant in clips
            else None
            for variant in comparison.variants
        },
    )


def _media_uri(path: Path, media_type: str) -> str | None:
    return data_uri(path.read_bytes(), media_type) if path.is_file() else None
