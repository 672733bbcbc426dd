"""The report as text: terminal, Markdown and CSV, and the words that every form shares."""

import csv
import io
import json

from pydantic import JsonValue
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignlab.experiments.numbers import DASH, format_duration
from alignlab.experiments.quantities import ARROWS
from alignlab.experiments.result import Comparison
from alignlab.experiments.summary import (
    SummaryRow,
    by_metric,
    joined,
    summary_notes,
    summary_rows,
)
from alignlab.experiments.verdict import verdict


def print_summary(comparison: Comparison, console: Console) -> None:
    """Print verdict, summary table and notes of the report on a terminal."""
    rows = summary_rows(comparison)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("metric")
    table.add_column("variant")
    table.add_column("mean" if len(comparison.seeds) == 1 else "mean ± std", justify="right")
    table.add_column(Text(f"to {comparison.baseline}"), justify="right")
    if len(comparison.seeds) > 1:
        table.add_column("better in")
    for group in headline(rows):
        for row in group:
            name = title(row) if row is group[0] else ""
            style = "bold" if row.is_best else "dim" if row.is_baseline else ""
            cells = [name, row.variant, row.value_text, joined(row.diff_text), row.agreement]
            texts = [Text(cell, style) for cell in cells[: len(table.columns)]]
            table.add_row(*texts, end_section=row is group[-1])
    for sentence in verdict(comparison, rows):
        console.print(Text(sentence))
    console.print(table)
    for note in summary_notes(comparison, rows):
        console.print(Text(note, "dim"))


def markdown(comparison: Comparison, rows: list[SummaryRow]) -> str:
    """The report without pictures, as Markdown."""
    names = [_escape(variant) for variant in comparison.variants]
    lines = [
        f"# {_escape(comparison.name)}",
        "",
        *(_escape(text) + "\n" for text in verdict(comparison, rows)),
    ]
    lines += ["| metric |" + "".join(f" {name} |" for name in names)]
    lines += ["|---|" + "---:|" * len(names)]
    for group in headline(rows):
        cells = [f"**{row.value_text}**" if row.is_best else row.value_text for row in group]
        lines.append(f"| {_escape(title(group[0]))} | " + " | ".join(cells) + " |")
        if any(row.diff_text[0] for row in group):
            lines.append("| … to baseline | " + " | ".join(_paired(row) for row in group) + " |")
    notes = summary_notes(comparison, rows)
    lines += ["", reading(comparison), "", *(f"- {_escape(note)}" for note in notes)]
    lines += ["", "## What differs", "", *_markdown_settings(comparison)]
    lines += ["", "## How it was made", ""]
    made = facts(comparison) | {name: plain(v) for name, v in comparison.environment.items()}
    lines += [f"- {_escape(name)}: {_escape(text)}" for name, text in made.items()]
    return "\n".join([*lines, "", "```yaml", comparison.recipe.rstrip(), "```", ""])


def table_csv(comparison: Comparison, rows: list[SummaryRow]) -> str:
    """Every metric of every variant in full precision, one line each; nothing for no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = [f"seed_{seed}" for seed in comparison.seeds]
    columns = ["mean", "std", "num_seeds", "diff_mean", "diff_std", "num_pairs", "num_better"]
    writer.writerow(["metric", "better", "variant", *columns, *seeds])
    for row in rows:
        writer.writerow(
            [
                row.metric,
                row.quantity.better,
                row.variant,
                row.mean,
                row.std,
                len(row.values),
                row.diff_mean,
                row.diff_std,
                len(row.differences),
                row.num_better,
                *(row.values.get(seed) for seed in comparison.seeds),
            ]
        )
    return text.getvalue()


def headline(rows: list[SummaryRow]) -> list[list[SummaryRow]]:
    """The metrics of the summary table, in order."""
    return [group for group in by_metric(rows) if group[0].headline]


def title(row: SummaryRow) -> str:
    """Name of a metric with an arrow to its better side."""
    return f"{row.quantity.label} {ARROWS[row.quantity.better]}".rstrip()


def _paired(row: SummaryRow) -> str:
    text = joined(row.diff_text)
    return f"{text} ({row.agreement})" if row.agreement else text


def reading(comparison: Comparison) -> str:
    """How to read the summary table."""
    arrows = "Arrows point to the better side; the best mean is bold."
    if len(comparison.seeds) == 1:
        return f"{arrows} Differences are to {comparison.baseline}, with the same seed."
    return (
        f"{arrows} Numbers are mean ± sample standard deviation over {len(comparison.seeds)} "
        f"seeds. Differences are paired: variant minus {comparison.baseline} with the same seed. "
        "A fraction says in how many seeds the variant is better."
    )


def facts(comparison: Comparison) -> dict[str, str]:
    """How the comparison was made."""
    return {
        "command": comparison.command,
        "commit": comparison.commit or "outside a git checkout",
        "seeds": ", ".join(str(seed) for seed in comparison.seeds),
        "runs": f"{len(comparison.results)} of {len(comparison.variants) * len(comparison.seeds)}",
        "duration": format_duration(comparison.duration_s),
    }


def plain(value: JsonValue) -> str:
    """A setting as text: strings as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def value(values: dict[str, JsonValue], variant: str) -> str:
    """A variant's value of a setting, an em dash when it does not have the setting or leaves it."""
    found = values.get(variant)
    return DASH if found is None else plain(found)


def _markdown_settings(comparison: Comparison) -> list[str]:
    if not comparison.differing:
        return ["Nothing: the variants have the same settings."]
    names = [_escape(variant) for variant in comparison.variants]
    lines = ["| setting |" + "".join(f" {name} |" for name in names), "|---|" + "---|" * len(names)]
    for setting, values in comparison.differing.items():
        cells = [_escape(value(values, variant)) for variant in comparison.variants]
        lines.append(f"| {_escape(setting)} | " + " | ".join(cells) + " |")
    return lines


def _escape(text: str) -> str:
    for mark in "\\|<>*_`[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")
