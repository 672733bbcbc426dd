"""One run of several, as every launcher trains it."""

from alignlab.config.run import RunConfig
from alignlab.train import train
from alignlab.training.setup import Caches, shared_caches

RunKey = tuple[str, int]  # variant, seed


def train_one(run: RunConfig, caches: dict[str, Caches], *, wait: bool) -> None:
    """Trains, or goes on with, a run whose folder exists, as the only process that writes there.

    Args:
        run: its recipe.
        caches: encoded clips of the runs that this process has trained; those that this run can
            share are used, new ones are added.
        wait: wait for another process that trains the run; else refuse.

    Raises:
        UserError: the run cannot be trained, or another process trains it and `wait` is false.
    """
    train(run, caches=shared_caches(run, caches), wait=wait)


def shown(key: RunKey) -> str:
    """A run as messages name it."""
    variant, seed = key
    return f"{variant}, seed {seed}"
