"""Text that somebody else wrote, as each form of a report may hold it.

Captions, file names, warnings and what a `comparison.json` from elsewhere holds are any text at
all. Here it becomes text that no reader runs and no file refuses: each form escapes it where it
writes it. HTML is escaped by the templates (`page.render`), LaTeX in `latex`.
"""

import re
import unicodedata

# They turn the direction of what follows, so that a line reads as what it does not say.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_BYTE_ORDER_MARK = "\ufeff"  # nobody sees it, and matplotlib cannot write it into a PDF
_ACTING = ("Cc", "Cs", "Zl", "Zp")
_ODD = re.compile("[^ -~]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_BLOCK = re.compile(r"(?:#+(?=\s|$)|[+=-](?=[\s=-]|$)|\d+[.)](?=\s|$))")
_MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {c: f"\\{c}" for c in "\\|*_`[]~$"}


def visible(text: str) -> str:
    r"""The text with what acts instead of being seen as escapes: `\x1b`, `\ud800`, `\u202e`.

    Those are control characters but for line breaks and tabs, halves of surrogate pairs, which no
    file can hold, separators of lines and paragraphs, marks of direction, and byte order marks.

    >>> visible("a\x1b[31m\ud83d b\n")
    'a\\x1b[31m\\ud83d b\n'
    >>> visible("a\ufeffb")
    'a\\ufeffb'
    """
    return _ODD.sub(_shown, text)


def one_visible_line(text: str) -> str:
    """The same in one line: a line break or a tab is a space."""
    return re.sub(r"\r\n|[\n\r\t]", " ", visible(text.replace("\r\n", "\n").replace("\r", "\n")))


def markdown_text(text: str) -> str:
    r"""Text that Markdown shows as it is, in one line; no HTML of it is left.

    >>> markdown_text("# <b>a|b</b>")
    '\\# &lt;b&gt;a\\|b&lt;/b&gt;'
    """
    line = one_visible_line(text)
    escaped = "".join(_MARKDOWN.get(mark, mark) for mark in line)
    begin = _BLOCK.match(escaped)
    if begin is None:
        return escaped
    place = begin.end() - 1  # what makes a heading, a list or a rule of the line
    return f"{escaped[:place]}\\{escaped[place:]}"


def markdown_code(text: str, language: str) -> list[str]:
    """The lines of a block of code, which the text cannot end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", visible(text).rstrip(), fence]


def csv_cell(value: object) -> object:
    """A cell that no spreadsheet runs: text that would be a formula begins with an apostrophe.

    A number stays a number, also a negative one.

    >>> csv_cell("=1+1"), csv_cell(-1.5), csv_cell("a-b")
    ("'=1+1", -1.5, 'a-b')
    """
    if not isinstance(value, str):
        return value
    text = one_visible_line(value)
    return f"'{text}" if value.startswith(_FORMULA) else text


def _shown(match: re.Match[str]) -> str:
    char = match[0]
    acts = char in _TURNING or char == _BYTE_ORDER_MARK or unicodedata.category(char) in _ACTING
    if char in "\n\t" or not acts:
        return char
    return ascii(char)[1:-1]
