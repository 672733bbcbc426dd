"""What torchrun or `accelerate launch` say in the environment of each process. Imports no torch."""

import os

from alignlab.errors import UserError

# Set by srun and by MPI in each of several processes that they start.
OTHERS = ("SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


def process_count() -> int:
    """How many processes were started together."""
    return _number("WORLD_SIZE", 1)


def process_rank() -> int:
    """Which of them this one is, from 0."""
    return _number("RANK", 0) if process_count() > 1 else 0


def refuse_several() -> None:
    """For everything but the training of one run.

    Raises:
        UserError: this process is one of several.
    """
    if process_count() > 1:
        raise UserError(
            f"started as {process_count()} processes (WORLD_SIZE), and only `alignlab train` is "
            "for several: start this without accelerate or torchrun (docs/clusters.md)"
        )


def refuse_strangers() -> None:
    """For the training of one run, which several processes can only do if they know each other.

    Raises:
        UserError: several were started, and not everything tells them of each other.
    """
    for name in OTHERS:
        if "WORLD_SIZE" not in os.environ and _number(name, 1) > 1:
            raise UserError(
                f"{name}={os.environ[name]}, but no WORLD_SIZE: start one torchrun on each node "
                "and let it start the processes (docs/clusters.md)"
            )
    if process_count() > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"WORLD_SIZE={process_count()}, but no MASTER_ADDR: start the processes with torchrun, "
            "or unset WORLD_SIZE for a single one (docs/clusters.md)"
        )


def _number(name: str, default: int) -> int:
    given = os.environ.get(name) or str(default)
    if not given.isdecimal():
        raise UserError(f"{name}={given}: not a number; unset it, or start with torchrun")
    return int(given)
