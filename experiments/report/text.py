"""The report as text: terminal, Markdown and CSV, and the words that every form shares.

LaTeX is in `latex`.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from pydantic import JsonValue
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignlab.experiments.compare.result import Budget, Comparison
from alignlab.experiments.report.by_step import step_table
from alignlab.experiments.report.escaping import (
    csv_cell,
    markdown_code,
    markdown_text,
    one_visible_line,
)
from alignlab.experiments.report.findings import finding_lines, finding_markdown, judge
from alignlab.experiments.report.formatting import DASH, format_duration
from alignlab.experiments.report.metric_table import ARROWS
from alignlab.experiments.report.noise_floor import HEADER, READING, NoiseFloor, noise_floor
from alignlab.experiments.report.run_warnings import warning_sentences
from alignlab.experiments.report.statistics import MIN_PAIRS
from alignlab.experiments.report.summary import (
    SummaryRow,
    by_metric,
    footnotes,
    summary_rows,
)
from alignlab.experiments.report.tuning import markdown_tuning, spent_facts
from alignlab.experiments.report.verdict import verdict
from alignlab.losses.weight import GradientShare, weight_in_words

PRINTED_WARNINGS = 6
SHARE = "gradient_share"  # of a weight that is measured

# Column of table.csv to field of `Paired`.
_PAIRED = {
    "diff_mean": "mean",
    "diff_std": "std",
    "diff_low": "low",
    "diff_high": "high",
    "confidence": "confidence",
    "num_pairs": "num_pairs",
    "method": "method",
    "p_value": "p_value",
    "sign_flip_p": "sign_flip_p",
    "holm_p": "holm_p",
    "hedges_g": "effect_size",
    "detectable": "detectable",
}
# of what is measured once for all seeds, and of steps to target
_RATIO = ("ratio", "ratio_low", "ratio_high")


def print_summary(comparison: Comparison, console: Console) -> None:
    """Print verdict, warnings, summary table and footnotes of the report on a terminal."""
    rows = summary_rows(comparison)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("metric")
    table.add_column("variant")
    table.add_column("mean" if len(comparison.seeds) == 1 else "mean ± std", justify="right")
    if len(comparison.seeds) == 1:
        table.add_column(_printed(f"to {comparison.baseline}"), justify="right")
    else:
        table.add_column(_printed(f"to {comparison.baseline} [interval]"), justify="right")
        table.add_column("p", justify="right")
        table.add_column("better in")
    for group in headline(rows):
        for row in group:
            name = title(row) if row is group[0] else ""
            style = "bold" if row.is_bold else "dim" if row.is_baseline else ""
            cells = [name, row.variant, row.value_text, row.diff_text, row.p_text, row.agreement]
            texts = [_printed(cell, style) for cell in cells[: len(table.columns)]]
            table.add_row(*texts, end_section=row is group[-1])
    for line in finding_lines(judge(comparison, rows)):
        console.print(_printed(line))
    claims = verdict(comparison, rows)
    for sentence in (claims.lead, *claims.short.values()):
        console.print(_printed(sentence, "bold" if sentence is claims.lead else ""))
    floor = noise_floor(comparison, rows)
    if floor is not None:
        console.print(_printed(floor.sentence))
        for text in floor.warnings:
            console.print(_printed(f"Warning: {text}", "yellow"))
    warnings = warning_sentences(comparison)
    for text in warnings[:PRINTED_WARNINGS]:
        console.print(_printed(f"Warning: {text}", "yellow"))
    if len(warnings) > PRINTED_WARNINGS:
        more = len(warnings) - PRINTED_WARNINGS
        console.print(_printed(f"{more} more warnings are in the report.", "yellow"))
    console.print(table)
    if claims.reading:
        console.print(_printed(claims.reading, "dim"))
    for note in footnotes(comparison, rows):
        console.print(_printed(note, "dim"))


def _printed(text: str, style: str = "") -> Text:
    """Text for a terminal, which no escape sequence of it reaches."""
    return Text(one_visible_line(text), style)


def markdown(comparison: Comparison, rows: list[SummaryRow]) -> str:
    """The report without pictures, as Markdown."""
    names = [markdown_text(variant) for variant in comparison.variants]
    claims = verdict(comparison, rows)
    lines = [f"# {markdown_text(comparison.name)}", ""]
    lines += finding_markdown(judge(comparison, rows))
    lines += [f"**{markdown_text(claims.lead)}**", ""]
    lines += [*(f"- {markdown_text(text)}" for text in claims.short.values()), ""]
    floor = noise_floor(comparison, rows)
    lines += [] if floor is None else [markdown_text(floor.sentence), ""]
    warnings = [*(() if floor is None else floor.warnings), *warning_sentences(comparison)]
    if warnings:
        lines += ["**Warnings**", "", *(f"- {markdown_text(text)}" for text in warnings), ""]
    lines += ["| metric |" + "".join(f" {name} |" for name in names)]
    lines += ["|---|" + "---:|" * len(names)]
    for group in headline(rows):
        cells = [f"**{row.value_text}**" if row.is_bold else row.value_text for row in group]
        lines.append(f"| {markdown_text(title(group[0]))} | " + " | ".join(cells) + " |")
        if any(row.diff_text for row in group):
            lines.append("| … to baseline | " + " | ".join(_paired(row) for row in group) + " |")
    notes = footnotes(comparison, rows)
    lines += ["", markdown_text(reading(comparison)), ""]
    lines += [f"- {markdown_text(note)}" for note in notes]
    if claims.variants:
        lines += ["", "## The verdict in full", ""]
        lines += [f"- {markdown_text(text)}" for text in claims.variants.values()]
        lines += ["", markdown_text(claims.reading)] if claims.reading else []
    lines += [] if floor is None else _markdown_floor(floor)
    lines += _markdown_steps(comparison)
    lines += ["", "## What differs", "", *_markdown_settings(comparison, comparison.differing)]
    if comparison.tuning:
        lines += ["", "## How variants were tuned", ""]
        lines += _markdown_settings(comparison, spent_facts(comparison))
        lines += markdown_tuning(comparison)
    lines += ["", "## How it was made", ""]
    provenance = facts(comparison)
    provenance |= {name: as_text(v) for name, v in comparison.environment.items()}
    lines += [f"- {markdown_text(k)}: {markdown_text(text)}" for k, text in provenance.items()]
    return "\n".join([*lines, "", *markdown_code(comparison.recipe, "yaml"), ""])


def table_csv(comparison: Comparison, rows: list[SummaryRow]) -> str:
    """Every metric of every variant in full precision, one line each; nothing for no number.

    `diff_scale` says what the `diff_` columns are of: differences, or natural logarithms of the
    ratios that steps to target have under the seeds. What `never_reached_seeds` names has under its
    seed only what the ratio is larger than, and a mean that is no more than that is left out.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table_columns(comparison))
    for cells in table_cells(comparison, rows):
        writer.writerow(map(csv_cell, cells))
    return text.getvalue()


def table_columns(comparison: Comparison) -> list[str]:
    """The header of table.csv."""
    columns = ["metric", "better", "variant", "mean", "std", "num_seeds"]
    columns += ["diff_scale", *_PAIRED, *_RATIO, "num_better", "change", "never_reached_seeds"]
    return [*columns, *(f"seed_{seed}" for seed in comparison.seeds)]


def table_cells(
    comparison: Comparison, rows: list[SummaryRow]
) -> Iterator[list[str | float | None]]:
    """The lines of table.csv, of unescaped cells; None where there is no number."""
    for row in rows:
        measured = [row.mean, row.std, len(row.values)]
        paired = [*_paired_cells(row), *_ratio_cells(row)]
        values = [row.values.get(seed) for seed in comparison.seeds]
        start = [row.metric, row.quantity.better, row.variant]
        never = "" if row.target is None else " ".join(map(str, row.target.never))
        yield [*start, *measured, *paired, row.num_better, row.change, never, *values]


def headline(rows: list[SummaryRow]) -> list[list[SummaryRow]]:
    """The metrics of the summary table, in order."""
    return [group for group in by_metric(rows) if group[0].headline]


def title(row: SummaryRow) -> str:
    """Name of a metric with an arrow to its better side."""
    return f"{row.quantity.heading} {ARROWS[row.quantity.better]}".rstrip()


def _paired_cells(row: SummaryRow) -> list[str | float | None]:
    """What the differences are of, and their statistics without a mean that is only a bound."""
    if row.paired is None:
        return [None] * (1 + len(_PAIRED))
    cells = {column: getattr(row.paired, name) for column, name in _PAIRED.items()}
    if row.target is not None:
        cells["detectable"] = row.target.detectable
        if row.target.is_bound:
            cells["diff_mean"] = None
    return ["difference" if row.target is None else "log ratio", *cells.values()]


def _ratio_cells(row: SummaryRow) -> list[float | None]:
    if row.target is not None and row.target.interval is not None:
        return [row.target.mean, *row.target.interval]
    if row.ratio is None:
        return [None, None, None]
    low, high = (None, None) if row.ratio.low is None else row.ratio.interval
    return [row.ratio.value, low, high]


def _paired(row: SummaryRow) -> str:
    text = f"{row.diff_text}, p {row.p_text}" if row.p_text else row.diff_text
    return f"{text} ({row.agreement})" if row.agreement else text


def reading(comparison: Comparison) -> str:
    """How to read the summary table."""
    arrows, base = "Arrows point to the better side.", comparison.baseline
    if len(comparison.seeds) == 1:
        return f"{arrows} Differences are to {base}, with the same seed."
    text = (
        f"{arrows} Numbers are mean ± sample standard deviation over {len(comparison.seeds)} "
        f"seeds. Differences are paired, variant minus {base} with the same seed"
    )
    fraction = "A fraction says in how many seeds the variant is better."
    if len(comparison.seeds) < MIN_PAIRS:
        return f"{text}. {fraction}"
    return (
        f"{text}, with their interval, which excludes 0 exactly where a change is claimed, and the "
        f"corrected p. {fraction} Bold is what is claimed to be better than {base}; the variants "
        "are not tested against each other."
    )


def facts(comparison: Comparison) -> dict[str, str]:
    """How the comparison was made."""
    return {
        "command": comparison.command,
        "commit": comparison.commit or "outside a git checkout",
        "seeds": ", ".join(str(seed) for seed in comparison.seeds),
        "runs": f"{len(comparison.results)} of {len(comparison.variants) * len(comparison.seeds)}",
        "duration": format_duration(comparison.duration_s),
        "budget": "equal steps" if comparison.budget is None else budget_text(comparison.budget),
    }


def budget_text(budget: Budget) -> str:
    """What is equal, and the steps and cost of a step that follow from it."""
    steps = ", ".join(
        f"{variant} {count:,} ({budget.ratios[variant]:.3f})"
        for variant, count in budget.steps.items()
    )
    return f"{budget.label}: steps {steps}; in parentheses the cost of a step over the baseline's"


def as_text(value: JsonValue) -> str:
    """Strings as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def setting_table(
    comparison: Comparison, settings: dict[str, dict[str, JsonValue]]
) -> dict[str, dict[str, str]]:
    """Settings as text, by name and variant; an em dash where a variant does not set it."""
    return {
        name: {
            variant: DASH if values.get(variant) is None else as_text(values[variant])
            for variant in comparison.variants
        }
        for name, values in _weights_in_one_row(settings).items()
    }


def _weights_in_one_row(
    settings: dict[str, dict[str, JsonValue]],
) -> dict[str, dict[str, JsonValue]]:
    """Weights that are measured (`objectives.ra.weight.gradient_share`) in the row of the number
    that other variants have, in words; in how many steps, where it is said and not the default."""
    rows: dict[str, dict[str, JsonValue]] = {}
    for name, values in settings.items():
        weight, _, last = name.rpartition(".")
        is_share = name.startswith("objectives.") and weight.endswith(".weight")
        if is_share and last == "steps" and f"{weight}.{SHARE}" in settings:
            continue
        if not is_share or last != SHARE:
            rows.setdefault(name, {}).update(
                {variant: value for variant, value in values.items() if value is not None}
            )
            continue
        steps = settings.get(f"{weight}.steps", {})
        for variant, share in values.items():
            if isinstance(share, int | float):
                given: dict[str, Any] = {SHARE: share}
                if isinstance(steps.get(variant), int):
                    given["steps"] = steps[variant]
                measured = GradientShare.model_construct(**given)
                rows.setdefault(weight, {})[variant] = weight_in_words(measured)
    return rows


def _markdown_floor(floor: NoiseFloor) -> list[str]:
    """How far the baseline's two trainings differ, by metric of the summary table."""
    lines = ["", "## Noise floor", "", f"{READING} noise_floor.csv has every metric.", ""]
    lines += [f"| {' | '.join(HEADER)} |", f"|---|{'---:|' * (len(HEADER) - 1)}"]
    return lines + [f"| {' | '.join(map(markdown_text, texts))} |" for texts in floor.table]


def _markdown_steps(comparison: Comparison) -> list[str]:
    """Headline metrics of runs that were evaluated while they trained, by step."""
    steps, rows = step_table(comparison)
    if not rows:
        return []
    lines = ["", "## Metrics during training", "", "By step; steps.csv has every number.", ""]
    lines += ["| metric | variant |" + "".join(f" {step:,} |" for step in steps)]
    lines += ["|---|---|" + "---:|" * len(steps)]
    for label, variant, texts in rows:
        lines.append(
            f"| {markdown_text(label)} | {markdown_text(variant)} | " + " | ".join(texts) + " |"
        )
    return lines


def _markdown_settings(
    comparison: Comparison, settings: dict[str, dict[str, JsonValue]]
) -> list[str]:
    if not settings:
        return ["Nothing: the variants have the same settings."]
    names = [markdown_text(variant) for variant in comparison.variants]
    lines = ["| setting |" + "".join(f" {name} |" for name in names), "|---|" + "---|" * len(names)]
    for setting, texts in setting_table(comparison, settings).items():
        cells = [markdown_text(text) for text in texts.values()]
        lines.append(f"| {markdown_text(setting)} | " + " | ".join(cells) + " |")
    return lines
