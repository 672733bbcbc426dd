"""What MLflow lacks of run folders, sent after the training."""

import math
from pathlib import Path

from alignlab.config.parts import TrackingConfig, TrainingConfig
from alignlab.config.recipe_file import read_recipe
from alignlab.config.run import RunConfig
from alignlab.environment import read_environment
from alignlab.errors import UserError
from alignlab.recipe import validated
from alignlab.runs.run_folder import RunFolder, only_writer
from alignlab.stage1.config import Stage1Config
from alignlab.tracking.connection import connection
from alignlab.tracking.tracker import Shipper


def send_run(path: Path, *, to: str | None = None, within_s: float = math.inf) -> bool:
    """Sends what MLflow lacks of a run, and ends it there: `FINISHED`, or `KILLED` before its end.

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
    with only_writer(folder.path, wait=False):
        status = "FINISHED" if folder.result.exists() else "KILLED"
        return Shipper(way, folder, config, facts).end(status, within_s=within_s)


def stored_config(path: Path, *, to: str | None) -> TrainingConfig:
    """The recipe of a run folder, with the output that the folder lies in now.

    Args:
        path: the run folder.
        to: another place of MLflow; None: the recipe's.
    """
    recipe = RunFolder(path).recipe
    mapping = read_recipe(recipe, [])
    model = Stage1Config if "stage1" in mapping else RunConfig
    config: TrainingConfig = validated(model, mapping, stored=True)
    output = path.resolve().parents[config.name.count("/")]
    tracking = config.tracking
    if to is not None:
        place = validated(TrackingConfig, {"mlflow": to}, under="--to")
        tracking = tracking.model_copy(update={"mlflow": place.mlflow})
    return config.model_copy(update={"output": str(output), "tracking": tracking})
