"""What lies where in a run folder, and the lock that gives it one writer at a time.

recipe.yaml        the resolved recipe
inputs.json        digests of the files that it reads (`alignlab.runs.input_record`)
environment.json   versions, commit, hardware
metrics.jsonl      one row of scalars per logged step
checkpoints/step-000500/
samples/           generated clips
stage1/            the trained network, of a Stage 1 training
result.json        final metrics, digests of the Stage 1 networks that were used, in how many
                   samples objectives had something to align, whether it diverged, and notes of
                   all that there was warning of; its presence says that the run is finished
.writer.lock       the lock of the process that writes here

A launcher that takes a node for dead starts the run elsewhere, while the process on that node may
still live: behind a broken network, say. The lock (`alignlab.runs.file_lock`) ends with the process
that holds it. On NFS the server keeps it: for a node that is gone, until its lease has run out
(NFSv4, 90 s unless configured).
"""

import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignlab.config.parts import TrainingConfig
from alignlab.config.paths import user_path
from alignlab.config.recipe_file import read_recipe
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.recipe import dump, holds_recipe, load_run, shown_difference
from alignlab.runs.atomic_files import write_text
from alignlab.runs.file_lock import file_lock
from alignlab.runs.out_paths import make_output_folder

LOCK = ".writer.lock"
HOLDER = ".writer"
START_FILES = (  # of a run before its first checkpoint
    *(LOCK, HOLDER, "recipe.yaml", "inputs.json", "environment.json", "metrics.jsonl"),
    *("mlflow_run_id", "worker.log"),
)

log = logging.getLogger(__name__)


class RunFolder:
    """The folder `<output>/<name>` of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.stage1 = path / "stage1"
        self.result = path / "result.json"

    @classmethod
    def create(cls, config: TrainingConfig) -> "RunFolder":
        """Makes the folder, or opens it to resume the same recipe.

        A run of another recipe that kept no step gives way: it holds nothing but what a start
        writes, and so is begun anew.

        Raises:
            UserError: it holds a run of another recipe, or one whose clips were dealt otherwise.
        """
        folder = cls(make_output_folder(user_path(config.output), config.name))
        folder.check_split_rule()
        if folder.recipe.exists() and not holds_recipe(folder.recipe, config):
            if folder._gives_way(config):
                return folder
            raise UserError(
                f"{folder.path} holds a run of another recipe "
                f"({shown_difference(folder.recipe, config)}): "
                "choose another name, or remove the folder"
            )
        if not folder.recipe.exists() or folder.recipe.read_text() != dump(config):
            write_text(folder.recipe, dump(config))
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run.

        Raises:
            UserError: there is no run at `path`.
        """
        folder = cls(path)
        if not folder.recipe.is_file():
            raise UserError(f"{path}: no run there (a run folder has a recipe.yaml)")
        return folder

    def check_split_rule(self) -> None:
        """Refuses a run that another rule than today's dealt to train and val.

        A resolved recipe says every setting; that of a run that an older version began says
        nothing of the rule.

        Raises:
            UserError: it is such a run.
        """
        data = read_recipe(self.recipe, []).get("data") if self.recipe.is_file() else None
        if isinstance(data, dict) and data.get("name") == "folder" and "split_rule" not in data:
            raise UserError(
                f"{self.path} holds a run of an older version, which dealt the clips of "
                f"{data.get('path')} to train and val by another rule: choose another name, or "
                "use that version"
            )

    def _gives_way(self, config: TrainingConfig) -> bool:
        """Clears a folder whose run kept no step, for another recipe; false if it did keep one.

        Raises:
            UserError: a process trains there.
        """
        if self.has_begun or not all(map(_is_of_a_start, self.path.iterdir())):
            return False
        with only_writer(self.path, wait=False):
            if self.has_begun:
                return False
            difference = shown_difference(self.recipe, config)
            for path in self.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in (LOCK, HOLDER):
                    path.unlink()
            write_text(self.recipe, dump(config))
        log.info(
            "%s: its run of another recipe (%s) kept no step: it begins anew",
            *(self.path, difference),
        )
        return True

    @property
    def has_begun(self) -> bool:
        """Whether it keeps what was trained: a checkpoint, or the result."""
        return self.result.exists() or any(self.checkpoints.glob("step-*"))

    def config(self) -> RunConfig:
        """The recipe that the run was started with."""
        return load_run(self.recipe, stored=True)

    def read_result(self) -> dict[str, Any] | None:
        """What `result.json` says, or None while the run is not finished."""
        if not self.result.exists():
            return None
        content: dict[str, Any] = json.loads(self.result.read_text())
        return content


def _is_of_a_start(path: Path) -> bool:
    """Whether a run folder's entry says nothing of a step that was kept, and is ours."""
    if path.is_dir():  # leftovers of a killed process; clips of evaluations while it trained
        begins = {"checkpoints": (".step-",), "samples": ("step-", ".step-")}.get(path.name, ())
        return bool(begins) and all(entry.name.startswith(begins) for entry in path.iterdir())
    is_leftover = path.name.startswith(".") and path.name.endswith(".tmp")
    return path.is_file() and (path.name in START_FILES or is_leftover)


@contextmanager
def only_writer(folder: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock of a run folder.

    Args:
        folder: of the run; it exists.
        wait: wait while another process holds it; a line in the log says so every minute.

    Raises:
        UserError: another process holds it and `wait` is false, or the filesystem has no locks.
    """

    def refused() -> str:
        return (
            f"{folder} is being trained by another process ({_holder(folder)}): wait for it, or "
            "end it"
        )

    def waiting() -> str:
        return f"waiting for the process that trains in {folder} ({_holder(folder)})"

    with file_lock(folder / LOCK, waiting=waiting, refused=None if wait else refused):
        write_text(folder / HOLDER, f"{platform.node()}, process {os.getpid()}")
        yield


def _holder(folder: Path) -> str:
    holder = folder / HOLDER
    return holder.read_text() if holder.exists() else "unknown"
