"""The commands of `alignlab` as Markdown."""

from collections.abc import Iterator
from typing import Any

import typer

from alignlab.cli import app
from markdown_text import code, prose


def commands() -> str:
    """Every command with what it does, its usage, arguments and options."""
    return "\n".join(line for words, command in leaves() for line in _described(words, command))


def leaves() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, by the words that call it, in the order of `--help`."""
    yield from _below(("alignlab",), typer.main.get_command(app))


def _below(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
        return
    for name, one in inner.items():
        yield from _below((*words, name), one)


def _described(words: tuple[str, ...], command: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=" ".join(words))
    usage = " ".join([*words, *command.collect_usage_pieces(context)])
    yield from (f"## {code(' '.join(words))}", "")
    for paragraph in (command.help or "").split("\n\n"):
        yield from (prose(paragraph), "")
    yield from ("```text", usage.replace("{", "").replace("}", ""), "```", "")
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            yield from (code(record[0]), f": {prose(record[1]) or '(no help)'}", "")
