"""One run of several, as every launcher trains it."""

from pathlib import Path

from alignlab.config import RunConfig
from alignlab.experiments.launchers.one_writer import only_writer
from alignlab.run import Caches, new_caches
from alignlab.train import train

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
    key = run.model_dump_json(include={"model": {"path", "precision"}, "data": True})
    with only_writer(Path(run.output) / run.name, wait=wait):
        train(run, caches=caches.setdefault(key, new_caches(run)))


def shown(key: RunKey) -> str:
    """A run as messages name it."""
    variant, seed = key
    return f"{variant}, seed {seed}"
