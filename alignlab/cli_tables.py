"""Tables and JSON on the terminal."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


def print_json(content: Any) -> None:
    """Prints plain values as JSON."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
) -> None:
    """Prints rows under a header, and the header under a title if there is one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, title=title, title_justify="left")
    for column in table.columns:
        column.overflow = "fold"  # names and numbers are whole in a narrow terminal as well
    for row in rows:
        table.add_row(*map(Text, row))  # plain: brackets are no markup
    Console().print(table)
