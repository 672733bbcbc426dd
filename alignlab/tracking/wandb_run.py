"""Weights & Biases: a run for each run folder, offline in `<run>/wandb` unless WANDB_MODE is set.

Offline, W&B writes a folder that `wandb sync` uploads later. A resumed run writes rows again that
it had written after its checkpoint, and W&B takes none back: so the folder is written anew from
`metrics.jsonl` whenever the training begins or is resumed, with the same id, and the earlier one is
removed. No row is there twice, and none is missing.

Online, W&B resumes the run by its id, and gets the rows after the last that it was given
(`wandb.json`).
"""

import logging
import os
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from alignlab.config.parts import TrainingConfig
from alignlab.recipe import recipe_hash
from alignlab.runs.atomic_files import remove_folder
from alignlab.runs.checksums import DamagedError, read_json, write_json
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking.names import mlflow_params
from alignlab.tracking.other_trackers import OtherTracker
from alignlab.tracking.points import Point

log = logging.getLogger(__name__)

STATE = "wandb.json"  # also in `START_FILES` of a run folder
FOLDER = "wandb"  # also in `START_FOLDERS`
OFFLINE = ("offline", "dryrun")  # the second is W&B's older word
# Unless the environment says otherwise: no network unless asked.
ENVIRONMENT = {"WANDB_ERROR_REPORTING": "false"}
REFUSED = re.compile(r"[/\\#?%:]")  # in the name of a project
MAX_NAME = 128
# What W&B raises, besides its public errors, where its own process has ended.
INTERNAL_ERRORS = (
    ("wandb.sdk.lib.service.service_token", "WandbServiceConnectionError"),
    ("wandb.sdk.mailbox.mailbox", "MailboxClosedError"),
    ("wandb.sdk.mailbox.mailbox_handle", "HandleAbandonedError"),
)

Place = tuple[int, int]
"""Of a row: its step, and the how many-th of that step it is."""


class WandbRun(OtherTracker):
    """W&B's run of a folder; the x axis of every metric is `step`."""

    def __init__(self, folder: RunFolder, config: TrainingConfig, *, anew: bool) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import wandb

        mode = os.environ.get("WANDB_MODE") or OFFLINE[0]
        self._path = folder.path
        self._is_online = mode not in OFFLINE
        self._state = _state(folder.path, config, anew=anew)
        self._given: Place = (-1, 0)
        if self._is_online:
            self._given = (self._state["step"], self._state["rows"])
        else:
            _remove_offline(folder.path / FOLDER, self._state["id"])
        self._at: Place = (-1, 0)
        write_json(folder.path / STATE, self._state)
        project, _, rest = config.name.partition("/")
        self._run = wandb.init(
            project=REFUSED.sub("_", project)[:MAX_NAME],
            group=rest.rpartition("/")[0][:MAX_NAME] or None,
            name=config.name[-MAX_NAME:],
            id=self._state["id"],
            resume="allow" if self._is_online else None,
            config=mlflow_params(config) | {"alignlab.recipe_hash": recipe_hash(config)},
            dir=str(folder.path),
            mode=mode,
            reinit="create_new",
            settings=_settings(config),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Sequence[Point]) -> None:
        step, time_s = row[0].step, row[0].time_s
        self._at = (step, self._at[1] + 1 if self._at[0] == step else 1)
        if self._at <= self._given:
            return
        metrics = {point.name: point.value for point in row}
        self._run.log(metrics | {"step": step, "_timestamp": time_s})
        self._given = self._at
        if self._is_online:
            self._state |= {"step": step, "rows": self._at[1]}
            write_json(self._path / STATE, self._state)

    def end(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        try:
            import wandb
        except ImportError:
            return (ImportError,)
        found = []
        for module, name in INTERNAL_ERRORS:
            with suppress(ImportError, AttributeError):  # W&B may move them
                found.append(getattr(import_module(module), name))
        return (wandb.Error, OSError, ImportError, *found)


def _settings(config: TrainingConfig) -> Any:
    """W&B gets rows and settings: no console, code or command line, which may hold a password."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=not config.tracking.system_metrics,
    )


def _state(folder: Path, config: TrainingConfig, *, anew: bool) -> dict[str, Any]:
    """The run's id and the last row that W&B was given; new ones where it is another run."""
    here, recipe = str(folder.resolve()), recipe_hash(config)
    state = _read(folder)
    if state:
        written_for = Path(state["folder"])
        is_copy = written_for != folder.resolve() and _read(written_for).get("id") == state["id"]
        if not is_copy and not (anew and state["recipe"] != recipe):
            return state | {"folder": here, "recipe": recipe}
    return {"id": uuid.uuid4().hex[:16], "folder": here, "recipe": recipe, "step": -1, "rows": 0}


def _read(folder: Path) -> dict[str, Any]:
    """What `wandb.json` says; of a damaged one nothing, which is told: no training ends for it."""
    path, lost = folder / STATE, "W&B gets a run of its own for what follows"
    if not path.exists():
        return {}
    kinds = {"id": str, "folder": str, "recipe": str, "step": int, "rows": int}
    try:
        content = read_json(path, fix=lost)
        if any(type(content.get(key)) is not kind for key, kind in kinds.items()):
            raise DamagedError(path, "it is no record of a run", lost)
    except DamagedError as error:
        log.warning("%s", error)
        return {}
    return {key: content[key] for key in kinds}


def _remove_offline(folder: Path, run_id: str) -> None:
    """Removes what was written offline for a run: it is written again."""
    for path in folder.glob(f"offline-run-*-{run_id}"):
        remove_folder(path)
