"""What MLflow lacks of run folders, sent after the training."""

import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path

from alignlab.config.parts import TrackingConfig, TrainingConfig
from alignlab.environment import read_environment
from alignlab.errors import UserError
from alignlab.recipe import load_training, validated
from alignlab.runs.run_folder import RunFolder, only_writer, output_of
from alignlab.tracking.connection import Connection, connection
from alignlab.tracking.mlflow_run import ENDED, only_sender, read_state
from alignlab.tracking.tracker import Shipper

log = logging.getLogger(__name__)


def send_run(path: Path, *, to: str | None = None, within_s: float = math.inf) -> bool:
    """Sends what MLflow lacks of a run, and ends it there: `FINISHED`, or `KILLED` before its end.

    Another process that sends the same run is waited for.

    Args:
        path: the run folder.
        to: where MLflow is; None: as the recipe says.
        within_s: no further request is begun after that.

    Returns:
        Whether MLflow has all of it.

    Raises:
        UserError: there is no run, it is being trained, or the recipe says `tracking.mlflow: none`.
    """
    folder = RunFolder.open(path)
    config = stored_config(folder.path, to=to)
    way = connection(config)
    if way is None:
        raise UserError(f"{path}: its recipe says tracking.mlflow: none; name a place with --to")
    environment = folder.path / "environment.json"
    facts = read_environment(environment) if environment.exists() else {}
    with only_sender(folder.path), only_writer(folder.path, wait=False):
        status = "FINISHED" if folder.result.exists() else "KILLED"
        shipper = Shipper(way, folder, config, facts, only_sender=True)
        return shipper.end(status, within_s=within_s)


def send_unless_ended(path: Path, *, to: str | None, until: float) -> bool:
    """As `send_run`, of a run that MLflow may have whole; nothing is begun at `until` or later.

    Args:
        path: the run folder.
        to: as of `send_run`.
        until: as `time.monotonic()` counts.
    """
    if ENDED in read_state(path):
        return True
    left = until - time.monotonic()
    return left > 0 and send_run(path, to=to, within_s=left)


def send_each_unless_ended(
    paths: Iterable[Path], way: Connection, *, to: str, until: float
) -> bool:
    """As `send_unless_ended`, of several; whether MLflow has all of them.

    What is wrong with one is told, and the others are sent. Once MLflow is away, none is tried.

    Args:
        paths: the run folders.
        way: to `to`.
        to: where MLflow is.
        until: as `time.monotonic()` counts.
    """
    complete = True
    for path in paths:
        try:
            complete = send_unless_ended(path, to=to, until=until) and complete
        except UserError as error:
            log.warning("%s", error)
            complete = False
        if way.is_away:
            return False
    return complete


def stored_config(path: Path, *, to: str | None) -> TrainingConfig:
    """The recipe of a run folder, with the output that the folder lies in and its name there now.

    Args:
        path: the run folder.
        to: another place of MLflow; None: the recipe's.
    """
    config = load_training(RunFolder(path).recipe)
    tracking = config.tracking
    if to is not None:
        place = validated(TrackingConfig, {"mlflow": to}, under="--to")
        tracking = tracking.model_copy(update={"mlflow": place.mlflow})
    output = output_of(path, config.name)
    name = path.resolve().relative_to(output).as_posix()
    update = {"name": name, "output": str(output), "tracking": tracking}
    return config.model_copy(update=update)
