"""Docstrings are written as Markdown is; autodoc reads reStructuredText."""

import re
from collections.abc import Sequence

# Code; then what reStructuredText would take for markup elsewhere.
_MARKUP = re.compile(r"(?<!`)`([^`]+)`(?!`)(\w?)|([*|\\]|(?<=\w)_(?!\w)|(?<!\w)_(?=\w))")


_NOTHING = "\\ "  # an escaped space


def as_rst(lines: Sequence[str], *, is_value: bool = False) -> list[str]:
    """Gives a docstring as reStructuredText that looks the same.

    Code in backticks stays code, an indented paragraph below a line that ends in a colon becomes a
    block of code, and no other character is markup. Sections (`Args:`, `Raises:`) stay as they are,
    for napoleon, which takes what stands before a colon in the first line of `Returns:`, or of the
    docstring of an attribute, for a type: here types are in the signature, so that line is kept
    apart.

    Args:
        lines: as autodoc has them, without common indentation.
        is_value: it is of an attribute or a property.
    """
    made = _converted(lines)
    apart = [i + 1 for i, line in enumerate(made) if line.strip() == "Returns:" and made[i + 1 :]]
    for i in reversed(apart):
        made.insert(i, " " * _indent(made[i]) + _NOTHING)
    return [_NOTHING, *made] if is_value else made


def _converted(lines: Sequence[str]) -> list[str]:
    made: list[str] = []
    prose: list[str] = []
    block = 0  # how far the current block of code is indented; 0 outside of one
    for i, line in enumerate(lines):
        if block and line.strip() and _indent(line) < block:
            block = 0
        if block:
            made.append(line)
            continue
        prose.append(line)
        if _is_above_code(lines, i):
            prose[-1] = f"{line.rstrip()}:"
            block = _indent(lines[i + 2])
            made += _escaped(prose)
            prose = []
    return made + _escaped(prose)


def _is_above_code(lines: Sequence[str], i: int) -> bool:
    if not lines[i].rstrip().endswith(":") or len(lines) < i + 3 or lines[i + 1].strip():
        return False
    return bool(lines[i + 2].strip()) and _indent(lines[i + 2]) > _indent(lines[i])


def _escaped(lines: Sequence[str]) -> list[str]:
    return _MARKUP.sub(_as_markup, "\n".join(lines)).split("\n") if lines else []


def _as_markup(found: re.Match[str]) -> str:
    code, next_letter, special = found.groups()
    if special:
        return f"\\{special}"
    end = f"\\ {next_letter}" if next_letter else ""  # `Tensor`s: markup ends before a letter
    return f"``{' '.join(code.split())}``{end}"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
