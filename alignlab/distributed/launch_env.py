"""The environment variables that torchrun or `accelerate launch` set. Imports no torch."""

import os
import signal

from alignlab.errors import UserError, first_line
from alignlab.parent_process import end_with_parent

# Set by srun and by MPI in each of several processes that they start.
OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LAUNCHER = "ALIGNLAB_LAUNCHER"
"""Process number of the alignlab command that starts ranks: they write a checkpoint and end when it
is gone, or they would keep GPUs that nobody waits for."""
SAME_GPU = "Duplicate GPU"  # in what NCCL raises
LOST_RANK = "another rank has stopped"
GLOO = "gloo/transport"  # in what its collectives raise
# Set by `accelerate launch` for what no run here uses.
ACCELERATE_MODES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}


def world_size() -> int:
    """How many processes were started together."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this one is, from 0."""
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Which of the processes on this machine this one is, from 0: the number of its GPU."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


def is_for_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return _is_set("ACCELERATE_USE_CPU")


def refuse_several_ranks() -> None:
    """For everything but the training of one run.

    Raises:
        UserError: this process is one of several.
    """
    if world_size() > 1:
        raise UserError(
            f"started as {world_size()} processes (WORLD_SIZE), and only `alignlab train` is "
            "for several: start this without accelerate or torchrun (docs/clusters.md)"
        )


def refuse_other_launchers() -> None:
    """For `alignlab train`, which srun or MPI may have started several times, each alone.

    Raises:
        UserError: they did, and no process group is described.
    """
    for name in OTHER_LAUNCHERS:
        if not os.environ.get("WORLD_SIZE") and _number(name, 1) > 1:
            raise UserError(
                f"{name}={os.environ[name]}, but no WORLD_SIZE: start one torchrun on each node "
                "and let it start the processes (docs/clusters.md)"
            )


def check_process_group() -> None:
    """Whether the processes that were started together can form a process group.

    Raises:
        UserError: something of it is not described, or accelerate is configured for what no run
            here uses.
    """
    if world_size() > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
            if name not in os.environ:
                raise UserError(
                    f"WORLD_SIZE={world_size()}, but no {name}: start the processes with "
                    "torchrun, or unset WORLD_SIZE for a single one (docs/clusters.md)"
                )
        _number("MASTER_PORT", 0)
        if rank() >= world_size():
            raise UserError(f"RANK={rank()}, but WORLD_SIZE={world_size()}: start with torchrun")
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    modes = [mode for name, mode in ACCELERATE_MODES.items() if _is_set(name)]
    modes += ["torch.compile"] if compiler != "no" else []
    if modes:
        raise UserError(
            f"accelerate is configured for {modes[0]}, which nothing here does: use torchrun, or a "
            "configuration without it (docs/clusters.md)"
        )


def end_with_launcher() -> None:
    """For a rank that an alignlab command has started: ends it when that command is gone."""
    launcher = _number(LAUNCHER, 0)
    if launcher:
        end_with_parent(signal.SIGTERM, launcher)


def lost_rank_line(error: BaseException) -> str | None:
    """Says in one line that another rank is gone; None of an error that is none of a collective."""
    text = str(error)
    is_lost = type(error).__name__.startswith("Dist") or GLOO in text
    if world_size() == 1 or not is_lost:
        return None
    if SAME_GPU in text:
        return "two ranks have the same GPU: start as many ranks as there are GPUs"
    return lost_rank(error)


def lost_rank(error: BaseException) -> str:
    """The line of a rank that waits for one which is gone, by what the collective raised."""
    return (
        f"{LOST_RANK}, its own message says why ({first_line(error)}); where it has none it was "
        "killed, and the same command resumes from the newest checkpoint"
    )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}={text}: not a whole number; unset it, or start with torchrun")
    return int(text)
