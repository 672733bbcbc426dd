"""Errors on the command line: one line on stderr for what a user can mend."""

import errno
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from alignlab import interruption
from alignlab.distributed import launch_env
from alignlab.errors import UserError


class Commands(TyperGroup):
    """Turns what a user can mend into one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        rank = ""
        try:
            rank = _rank()
            result = super().invoke(ctx)
            interruption.check()
            return result
        except KeyboardInterrupt as stop:
            raise typer.Exit(interruption.tell(stop, rank)) from None
        except _user_errors() as error:
            interruption.settle()
            typer.echo(f"error{rank}: {error}", err=True)
            raise typer.Exit(2) from None
        except _write_errors() as error:
            if not _disk_is_full(error):
                raise
            where = getattr(error, "filename", None) or os.getcwd()
            typer.echo(
                f"error: the disk is full ({where}): free some space, or write elsewhere with "
                "output=FOLDER, and run the same command again",
                err=True,
            )
            raise typer.Exit(1) from None


def _rank() -> str:
    """Which rank this is, for ranks above 0."""
    rank = launch_env.rank()
    return f" (rank {rank} of {launch_env.world_size()})" if rank else ""


def _user_errors() -> tuple[type[BaseException], ...]:
    """Exceptions whose message is for the user; only modules already loaded can have raised."""
    plugins = sys.modules.get("alignlab.losses.plugins")
    return (UserError,) if plugins is None else (UserError, plugins.PluginError)


def _write_errors() -> tuple[type[BaseException], ...]:
    """Exceptions in which a full disk may hide; only libraries already loaded can have raised."""
    errors: list[type[BaseException]] = [OSError]
    for module, name in (
        ("safetensors", "SafetensorError"),
        ("sqlalchemy.exc", "OperationalError"),
    ):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def _disk_is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error) or "disk is full" in str(error)
