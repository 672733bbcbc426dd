"""The summary table as LaTeX: variants down, metrics across, as papers print it."""

from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.escaping import one_visible_line
from alignlab.experiments.report.statistics import MIN_PAIRS
from alignlab.experiments.report.summary import SummaryRow
from alignlab.experiments.report.text import headline

_ARROWS = {"lower": r"$\downarrow$", "higher": r"$\uparrow$", "none": ""}
_MARKS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{EM DASH}": "---",
    "\N{DAGGER}": r"\textdagger{}",
}


def table_tex(comparison: Comparison, rows: list[SummaryRow]) -> str:
    """A `table` that needs the booktabs package: mean, spread, difference and its interval.

    What is claimed to be better than the baseline is bold; a star marks every difference that the
    verdict claims. A `|` in a name is text. Compiles with pdfLaTeX, LuaLaTeX and XeLaTeX; names in
    other scripts than Latin need one of the last two, with a font that has them.
    """
    groups = headline(rows)
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in comparison.name)
    heads = [
        f"{escape(g[0].quantity.heading)} {_ARROWS[g[0].quantity.better]}".strip() for g in groups
    ]
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * len(groups)}}}",
        r"\toprule",
        _line(["variant", *heads]),
        r"\midrule",
    ]
    for place, variant in enumerate(comparison.variants):
        cells = [group[place] for group in groups]
        lines.append(_line([escape(variant), *(_value(row) for row in cells)]))
        if any(row.diff_text for row in cells):
            lines.append(_line(["", *(_difference(row) for row in cells)]))
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_caption(comparison)}{_target_caption(comparison, groups)}}}",
        rf"\label{{tab:{label}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text that LaTeX prints as it is.

    >>> escape("50% of a_b")
    '50\\\\% of a\\\\_b'
    """
    return "".join(_MARKS.get(mark, mark) for mark in one_visible_line(text))


def _line(cells: list[str]) -> str:
    # after a line's end a bracket or a star would be its argument
    guard = "{}" if cells[0].startswith(("[", "*")) else ""
    return guard + " & ".join(cells) + r" \\"


def _value(row: SummaryRow) -> str:
    text = escape(row.value_text)
    return rf"\textbf{{{text}}}" if row.is_bold else text


def _difference(row: SummaryRow) -> str:
    star = "$^{*}$" if row.change and row.ratio is None else ""  # of seeds alone
    return rf"{{\footnotesize {escape(row.diff_text)}{star}}}" if row.diff_text else ""


def _target_caption(comparison: Comparison, groups: list[list[SummaryRow]]) -> str:
    if all(group[0].target is None for group in groups):
        return ""
    return (
        " Steps to target: geometric mean of the steps to the last validation flow loss of "
        f"{escape(comparison.baseline)} over its own, and their change."
    )


def _caption(comparison: Comparison) -> str:
    num_seeds = len(comparison.seeds)
    if num_seeds == 1:
        return f"One seed; below, the difference to {escape(comparison.baseline)}."
    text = (
        rf"Mean $\pm$ standard deviation over {num_seeds} seeds; below, the paired difference to "
        f"{escape(comparison.baseline)}"
    )
    if num_seeds < MIN_PAIRS:
        return f"{text}."
    return (
        f"{text} with its interval at the level of Holm's correction over the variants, 95\\% or "
        r"more. $^{*}$: it excludes 0, $p \leq 0.05$ after the correction; bold: and is better."
    )
