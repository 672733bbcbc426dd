"""A page of the docs that is followed to the letter: its files, its commands, its other blocks."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from made_packages import answers

DOCS = Path(__file__).parents[2] / "docs"


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: (name, content), the name from a line such as `` `a.py`: ``."""
    return re.findall(r"^(?:`([\w.-]+)`:\n\n)?```\w+\n(.*?)```", text, flags=re.M | re.S)


class Page(NamedTuple):
    """What a page has a reader write and type.

    Args:
        files: blocks of code by the name that stands above them.
        blocks: the others, in order.
        commands: indented lines, in order.
    """

    files: dict[str, str]
    blocks: list[str]
    commands: list[str]


def read_page(name: str) -> Page:
    """Reads a page of `docs/`."""
    text = (DOCS / name).read_text()
    found = blocks(text)
    commands = re.findall(r"^ {4}((?:python|alignlab|cp|pip) .+)$", text, flags=re.M)
    files = {name: block for name, block in found if name}
    return Page(files, [block for name, block in found if not name], commands)


def follow(folder: Path, commands: Sequence[str], shorter: Mapping[str, str]) -> str:
    """Types commands of `alignlab`; gives all that they print.

    Args:
        folder: in which; packages are in its folder `installed`.
        commands: lines of a page.
        shorter: by the first two words behind `alignlab`, what is added to a line.
    """
    words = [shlex.split(command, comments=True)[1:] for command in commands]
    words = [[*line, *shlex.split(shorter.get(" ".join(line[:2]), ""))] for line in words]
    said = []
    for line, done in zip(words, answers(folder / "installed", *words, cwd=folder), strict=True):
        assert done.code == 0, (line, done.stdout, done.stderr)
        said.append(" ".join(line) + "\n" + done.stdout + done.stderr)
    return "\n".join(said)
