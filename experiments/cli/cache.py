"""`alignlab cache`. Heavy imports happen inside the commands."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignlab.cli_tables import print_table
from alignlab.config.paths import user_path
from alignlab.dataset_cache.disk_room import size_text

if TYPE_CHECKING:
    from alignlab.dataset_cache.survey import Group

GB = 10**9
DAYS = 14  # that status shows

cache_app = typer.Typer(help="What is encoded once and kept on disk.", no_args_is_help=True)

Cache = Annotated[
    Path,
    typer.Argument(parser=user_path, metavar="PATH", help="The folder of a dataset cache."),
]


@cache_app.command("status")
def status(path: Cache) -> None:
    """Show entries, sizes, cosine errors, and when they were written."""
    from alignlab.dataset_cache.survey import days, groups, survey

    found = survey(path)
    rows = [
        (kind, dtype, *_amount(group), *_errors(group), _moment(group.first), _moment(group.last))
        for (kind, dtype), group in groups(found).items()
    ]
    header = ("kind", "stored as", "entries", "size", "cosine error: mean", "max")
    print_table((*header, "first written", "last written"), rows)
    by_day = list(days(found).items())[-DAYS:]
    if len(by_day) > 1:
        print_table(
            ("written on", "entries", "size"), [(day, *_amount(group)) for day, group in by_day]
        )
    typer.echo(
        f"{sum(1 for _ in found.rows()):,} entries, {size_text(found.file_bytes)} in "
        f"{len(found.indexes):,} shards, {found.num_copies:,} copies"
    )
    for name, reason in found.damaged.items():
        typer.echo(f"{found.shards / name} is damaged: {reason}")
    _tell_unreadable(found.shards, found.unreadable)
    if found.leftovers:
        typer.echo(f"note: {len(found.leftovers)} shards are being written, or were when killed")


@cache_app.command("verify")
def verify(
    path: Cache,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is damaged.")] = False,
) -> None:
    """Read every entry, compare its checksum; exit 1 if one is damaged or unreadable and stays."""
    from alignlab.dataset_cache.prune import remove_damaged
    from alignlab.dataset_cache.survey import damaged_entries, described, survey

    found = survey(path)
    damaged = damaged_entries(found)
    for name, reason in found.damaged.items():
        typer.echo(f"{found.shards / name} is damaged: {reason}")
    for (name, id), reason in damaged.items():
        typer.echo(f"{found.shards / name} is damaged: {reason}: {described(found, name, id)}")
    _tell_unreadable(found.shards, found.unreadable)
    total = f"{sum(1 for _ in found.rows()):,} entries in {len(found.indexes):,} shards"
    if not damaged and not found.damaged:
        if found.unreadable:
            typer.echo(f"{total}, what can be read is whole")
            raise typer.Exit(1)
        typer.echo(f"{total}, all whole")
        return
    typer.echo(f"{total}, {len(damaged):,} entries and {len(found.damaged):,} shards damaged")
    if not remove:
        typer.echo(f"remove them: alignlab cache verify {path} --remove")
        raise typer.Exit(1)
    remove_damaged(found, damaged)
    typer.echo("removed: the next run or `alignlab cache build` computes them again")
    if found.unreadable:
        raise typer.Exit(1)


@cache_app.command("prune")
def prune(
    path: Cache,
    older_than: Annotated[
        float | None,
        typer.Option(min=0, metavar="DAYS", help="Remove entries that were written earlier."),
    ] = None,
    max_size: Annotated[
        float | None,
        typer.Option(min=0, metavar="GB", help="Remove the oldest until the rest is no larger."),
    ] = None,
    unused_by: Annotated[
        list[str] | None,
        typer.Option(
            "--unused-by",
            metavar="RECIPE",
            help="Remove what a recipe does not read; repeat it for all that read this cache.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove copies, damaged shards and leftovers, put small shards together, and what you ask."""
    from alignlab.dataset_cache.prune import prune as run
    from alignlab.dataset_cache.shard_folder import SHARDS

    result = run(
        path,
        older_than_days=older_than,
        max_bytes=None if max_size is None else max_size * GB,
        used=_used_by(unused_by) if unused_by else None,
        dry_run=dry_run,
    )
    words = {
        "copies": "copies",
        "damaged": "damaged",
        "older": f"written more than {older_than} days ago",
        "oldest": f"the oldest, above {max_size} GB",
        "unused": f"read by none of {', '.join(unused_by or ())}",
    }
    for reason, number in sorted(result.reasons.items()):
        typer.echo(f"{number:,} entries: {words[reason]}")
    for number, what in (
        (result.damaged_shards, "damaged shards"),
        (result.leftovers, "unfinished shards of killed writers"),
        (result.merged, "small shards put together"),
    ):
        if number:
            typer.echo(f"{number:,} {what}")
    _tell_unreadable(path / SHARDS, result.unreadable)
    typer.echo(
        f"{'would stay' if dry_run else 'stay'}: {result.kept:,} entries, "
        f"{size_text(result.size_after)} of {size_text(result.size_before)}"
    )


def _used_by(recipes: list[str]) -> set[str]:
    from alignlab.experiments.compare.config import load_trainings
    from alignlab.training.cache_build import used_entries

    return used_entries([t for recipe in recipes for t in load_trainings(recipe)[0]])


def _tell_unreadable(shards: Path, reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        typer.echo(f"{shards / name} cannot be read, and stays: {reason}")


def _amount(group: "Group") -> tuple[str, str]:
    return f"{group.entries:,}", size_text(group.size)


def _errors(group: "Group") -> tuple[str, str]:
    if not group.lossy:
        return "-", "-"
    return f"{group.error_sum / group.lossy:.1e}", f"{group.error_max:.1e}"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
