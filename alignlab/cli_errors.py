"""Errors on the command line: one line on stderr for what a user can mend.

Exit code 2 where the user's words are wrong, 1 where the machine is, 128 and more after a signal.
"""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from alignlab import interruption
from alignlab.distributed import launch_env
from alignlab.errors import MACHINE_ERROR, USER_ERROR, UserError
from alignlab.out_of_memory import out_of_memory_line
from alignlab.runs.disk_errors import as_os_error, shown


class Commands(TyperGroup):
    """Turns what a user can mend, and what the machine refuses, into one line on stderr."""

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
            raise typer.Exit(USER_ERROR) from None
        except BrokenPipeError:  # of `alignlab list ... | head`: typer ends silently
            raise
        except _machine_errors() as error:
            known = as_os_error(error)
            if known is None:
                raise
            interruption.settle()
            typer.echo(f"error{rank}: {shown(known)}", err=True)
            raise typer.Exit(MACHINE_ERROR) from None
        except (RuntimeError, MemoryError) as error:
            line = out_of_memory_line(error) or launch_env.lost_rank_line(error)
            if line is None:
                raise
            interruption.settle()
            typer.echo(f"error{rank}: {line}", err=True)
            raise typer.Exit(MACHINE_ERROR) from None


def _rank() -> str:
    """Which rank this is, for ranks above 0."""
    rank = launch_env.rank()
    return f" (rank {rank} of {launch_env.world_size()})" if rank else ""


def _user_errors() -> tuple[type[BaseException], ...]:
    """Exceptions whose message is for the user; only modules already loaded can have raised."""
    errors: list[type[BaseException]] = [UserError]
    for module, name in (
        ("alignlab.losses.plugins", "PluginError"),
        ("alignlab.kernels.plugins", "ImplementationError"),
    ):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def _machine_errors() -> tuple[type[BaseException], ...]:
    """Exceptions in which an OSError may hide; only libraries already loaded can have raised."""
    errors: list[type[BaseException]] = [OSError]
    for module, name in (
        ("safetensors", "SafetensorError"),
        ("sqlalchemy.exc", "DBAPIError"),
        ("optuna.exceptions", "StorageInternalError"),
        ("mlflow.exceptions", "MlflowException"),
    ):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)
