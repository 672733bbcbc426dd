"""What lies where in a run folder, and the lock that gives it one writer at a time.

recipe.yaml        the resolved recipe
inputs.json        digests of the files that it reads (`alignlab.runs.input_record`)
environment.json   versions, commit, hardware
metrics.jsonl      one row of scalars per logged step
checkpoints/step-000500/, and copies of weights, checkpoints/weights-000250/
samples/           generated clips
stage1/            the trained network, of a Stage 1 training
history.json       the legs of a run that was prolonged (`alignlab.runs.prolong`)
result-000500.json the result of 500 steps, of a run that was prolonged since
recipe-000800.yaml the recipe with 800 steps, for whoever prolongs the run (`compare --list-runs`)
result.json        final metrics, digests of the Stage 1 networks that were used, in how many
                   samples objectives had something to align, whether it diverged, notes of all
                   that there was warning of, and checksums of the files above; its presence says
                   that the run is finished
mlflow.json        which run of MLflow is this one's, unless `tracking.mlflow` is `none`; its
                   parent and further tags are in mlflow_tags.json (`alignlab.tracking`)
error.json         the error that ended the last training of it; gone when the next one begins
tensorboard/       with `tracking.also`: an event file;
wandb/             what W&B writes, and in wandb.json which run of it is this one's
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignlab.config.parts import TrainingConfig
from alignlab.config.path_kinds import not_a_run
from alignlab.config.paths import user_path
from alignlab.config.recipe_file import read_recipe, shipped_recipes
from alignlab.config.run import RunConfig
from alignlab.config.written_names import ERROR
from alignlab.errors import UserError, one_line
from alignlab.recipe import dump, holds_recipe, load_run, shown_difference
from alignlab.runs import prolong
from alignlab.runs.atomic_files import write_text
from alignlab.runs.checkpoint_folders import (
    WEIGHTS_ONLY,
    has_optimizer,
    latest,
    newest_step,
    no_checkpoint,
    step_folders,
)
from alignlab.runs.checksums import (
    CHECKSUMS,
    DamagedError,
    damaged_files,
    file_checksums,
    files_below,
    read_json,
    with_checksum_line,
    without_checksum_line,
    write_json,
)
from alignlab.runs.code_record import RECORD
from alignlab.runs.file_lock import WRITER, HeldError, file_lock
from alignlab.runs.out_paths import make_output_folder

log = logging.getLogger(__name__)

FILES = "files"
"""Key of `result.json`: SHA-256 of the files that the run leaves, by name."""
LOCK = WRITER
HOLDER = ".writer"
START_FILES = (  # of a run before its first checkpoint
    *(LOCK, HOLDER, "recipe.yaml", "inputs.json", "environment.json", "metrics.jsonl"),
    *(
        "mlflow_run_id",
        "mlflow.json",
        "mlflow_tags.json",
        ".mlflow.lock",
        "wandb.json",
        "worker.log",
        prolong.HISTORY,
        ERROR,
        RECORD,
        "code.diff",
    ),
)
START_FOLDERS = ("tensorboard", "wandb")  # likewise


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
        self.error = path / ERROR

    @classmethod
    def create(cls, config: TrainingConfig) -> "RunFolder":
        """Makes the folder, or opens it to resume the same recipe, maybe with more steps.

        A run of another recipe that kept no step gives way: it holds nothing but what a start
        writes, and so is begun anew.

        Raises:
            UserError: it holds a run of another recipe, one that cannot be prolonged so, or one
                whose clips were dealt otherwise, or the recipe in it is damaged.
        """
        folder = cls(make_output_folder(user_path(config.output), config.name))
        folder.check_recipe_file()
        folder.check_split_rule()
        if folder.has_begun and not folder.recipe.exists():
            log.warning(
                "%s: its recipe.yaml is gone: whether the run was begun with these settings is "
                "not known",
                folder.path,
            )
        if not folder.recipe.exists():
            folder.write_recipe(config)
        elif folder._holds_numbers_of(config) or not folder._gives_way(config):
            folder.check_goes_on(config)
            folder._offer_settings(config)
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run.

        Raises:
            UserError: there is no run at `path`, or its recipe is damaged.
        """
        folder = cls(path)
        folder.check_recipe_file()
        if not folder.recipe.is_file():
            raise UserError(_why_no_run(path))
        return folder

    def check_recipe_file(self) -> None:
        """Refuses a `recipe.yaml` that is not what was written.

        Raises:
            DamagedError: it is damaged, or was edited.
        """
        fix = (
            "copy it back from elsewhere, or remove it and give the command that began the run "
            "again, which writes it; if you edited it, remove its first line"
        )
        if self.recipe.is_dir():
            raise DamagedError(self.recipe, "it is a folder", fix)
        if not self.recipe.exists():
            return
        try:
            without_checksum_line(self.recipe.read_text("utf-8"))
            read_recipe(self.recipe, [])
        except ValueError as error:
            raise DamagedError(self.recipe, one_line(error), fix) from error
        except UserError as error:
            reason = str(error).removeprefix(f"{self.recipe}: ")
            raise DamagedError(self.recipe, reason, fix) from error

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

    def check_goes_on(self, config: TrainingConfig) -> None:
        """Refuses a recipe that the training in the folder does not go on with.

        Raises:
            UserError: it is of other numbers, or of a number of steps that cannot be had.
        """
        if not self._holds_numbers_of(config) and not prolong.goes_on(self, config):
            raise UserError(
                f"{self.path} holds a run of another recipe "
                f"({shown_difference(self.recipe, config)}): "
                "choose another name, or remove the folder"
            )

    def take_settings(self, config: TrainingConfig) -> None:
        """Makes settings that change no number those of the folder, whose lock this process holds.

        A finished run was not trained with settings that are given later (`eval.every`), and a
        prolonged one takes them with its leg.
        """
        if self._lacks_settings(config):
            self.write_recipe(config)

    def _offer_settings(self, config: TrainingConfig) -> None:
        """`take_settings`, unless a process trains there, with settings of its own."""
        if self._lacks_settings(config):
            with suppress(HeldError), only_writer(self.path, wait=False):
                self.take_settings(config)

    def _lacks_settings(self, config: TrainingConfig) -> bool:
        if self._is_recipe(config) or not holds_recipe(self.recipe, config):
            return False
        return not self.is_finished_at(config.steps)

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
            self.write_recipe(config)
        log.info(
            "%s: its run of another recipe (%s) kept no step: it begins anew",
            *(self.path, difference),
        )
        return True

    @property
    def has_begun(self) -> bool:
        """Whether it keeps what was trained: a checkpoint, or the result."""
        return self.result.exists() or bool(step_folders(self.checkpoints))

    def steps_done(self) -> int:
        """Steps of the newest checkpoint, or of the result where there is none."""
        return newest_step(self.checkpoints) or int((self.read_result() or {"steps": 0})["steps"])

    def is_finished_at(self, steps: int) -> bool:
        """Whether there is the result of a training of at least so many steps."""
        result = self.read_result()
        return result is not None and int(result["steps"]) >= steps

    def earlier_result(self, steps: int) -> Path:
        """Where the result of so many steps is kept once the run is prolonged."""
        return self.path / f"result-{steps:06d}.json"

    def longer_recipe(self, steps: int) -> Path:
        """Where a recipe with more steps than the run's own waits for its training."""
        return self.path / f"recipe-{steps:06d}.yaml"

    def check_resumable(self) -> None:
        """Refuses a run that has no checkpoint to go on from.

        Raises:
            UserError: there is none, or one of weights only.
        """
        checkpoints = step_folders(self.checkpoints)
        if not checkpoints:
            raise no_checkpoint(self.checkpoints)
        if not has_optimizer(checkpoints[-1]):
            raise UserError(f"{checkpoints[-1]} {WEIGHTS_ONLY}")

    def config(self) -> RunConfig:
        """The recipe that the run was started with."""
        return load_run(self.recipe, stored=True)

    def write_recipe(self, config: TrainingConfig) -> None:
        """Makes a recipe that of the folder, unless it is."""
        if not self._is_recipe(config):
            write_text(self.recipe, with_checksum_line(dump(config)))

    def _is_recipe(self, config: TrainingConfig) -> bool:
        text = with_checksum_line(dump(config))
        return self.recipe.exists() and self.recipe.read_text() == text

    def _holds_numbers_of(self, config: TrainingConfig) -> bool:
        # the first costs a third of the second, and is so wherever nothing was changed
        return self._is_recipe(config) or holds_recipe(self.recipe, config)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes `result.json`, with checksums of what the run leaves besides."""
        write_json(self.result, {**result, FILES: file_checksums(self.path, self._kept_files())})

    def read_result(self) -> dict[str, Any] | None:
        """What `result.json` says, or None while the run is not finished.

        Raises:
            UserError: it is damaged.
        """
        if not self.result.exists():
            return None
        content = read_json(self.result, fix=self.file_fix())
        if not isinstance(content.get("metrics"), dict):
            raise DamagedError(self.result, "it has no metrics", self.file_fix())
        if not isinstance(content.get("steps"), int):
            raise DamagedError(self.result, "it has no steps", self.file_fix())
        return content

    def file_fix(self) -> str:
        """What to do about a damaged file of a finished run, by what its checkpoints allow."""
        newest = latest(self.checkpoints)
        if newest is None:
            then = f"{self.result}: the same command then trains the run again, from its first step"
            why = ", since its checkpoints are gone (checkpoint.keep_finished)"
        elif has_optimizer(newest):
            then = f"{self.result}: the same command then evaluates the run again"
            why = " from its last checkpoint"
        else:
            then = f"{self.path}: the same command then trains the run again, from its first step"
            why = ", since its checkpoint holds weights only (checkpoint.keep_finished)"
        return f"copy it back from elsewhere, or remove {then}{why}"

    def check_files(self, result: Mapping[str, Any]) -> None:
        """Refuses a finished run whose log, samples or environment are not those that it wrote.

        Args:
            result: what `read_result` gave; an older version's names no files.

        Raises:
            UserError: it names the first such file.
        """
        # of changed inputs `hold_inputs` says more
        read = {n: digest for n, digest in result.get(FILES, {}).items() if n != "inputs.json"}
        for name, what in damaged_files(self.path, read).items():
            raise DamagedError(self.path / name, what, self.file_fix())

    def sample_list(self, samples: Path | None = None) -> list[dict[str, Any]]:
        """What `samples.json` says of each generated clip: its key, caption and files.

        Args:
            samples: the folder of the clips; None: of those at the end of the training.

        Raises:
            UserError: it is damaged.
        """
        path = (samples or self.samples) / "samples.json"
        if not path.exists():
            return []
        fix = self.file_fix()
        try:
            clips = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DamagedError(path, one_line(error), fix) from error
        if not isinstance(clips, list) or not all(map(_is_clip, clips)):
            raise DamagedError(path, "it is no list of clips", fix)
        return clips

    def _kept_files(self) -> list[str]:
        """What no later command writes again."""
        names = ["metrics.jsonl", "environment.json", "inputs.json", "history.json"]
        for pattern in ("code*", "result-*"):
            names += sorted(path.name for path in self.path.glob(pattern))
        names += [f"samples/{name}" for name in files_below(self.samples)]
        names += [f"stage1/{name}" for name in (*files_below(self.stage1), CHECKSUMS)]
        return [name for name in names if (self.path / name).is_file()]


def _why_no_run(path: Path) -> str:
    """What was named in place of a run, as far as it can be told."""
    if not path.exists() and str(path) in shipped_recipes():
        return f"{path} is a recipe, not a run: `alignlab train {path}` makes the run"
    return not_a_run(path) or f"{path}: no run there (a run folder has a recipe.yaml)"


def _is_clip(clip: object) -> bool:
    texts = ("key", "caption", "video", "real")
    if not isinstance(clip, dict) or not isinstance(clip.get("references"), list):
        return False
    return all(isinstance(clip.get(name), str) for name in texts)


def _is_of_a_start(path: Path) -> bool:
    """Whether a run folder's entry says nothing of a step that was kept, and is ours."""
    if path.is_dir():  # leftovers of a killed process; clips of evaluations while it trained
        if path.name in START_FOLDERS:
            return True
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


def output_of(path: Path, name: str) -> Path:
    """The output that a folder lies in now; names may have several parts."""
    return path.resolve().parents[name.count("/")]


def in_its_output(folder: RunFolder, config: RunConfig) -> RunConfig:
    """The recipe with the output that its folder lies in now, beside its cache."""
    return config.model_copy(update={"output": str(output_of(folder.path, config.name))})
