"""What torchrun or `accelerate launch` say in the environment of each process. Imports no torch."""

import os

from alignlab.errors import UserError


def process_count() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def refuse_several() -> None:
    """For everything but the training of one run.

    Raises:
        UserError: this process is one of several.
    """
    if process_count() > 1:
        raise UserError(
            f"started as {process_count()} processes, and only `alignlab train` is for several: "
            "start this without accelerate or torchrun (docs/clusters.md)"
        )
