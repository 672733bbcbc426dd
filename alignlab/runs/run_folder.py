"""What lies where in a run folder, and how files get there whole.

recipe.yaml        the resolved recipe
environment.json   versions, commit, hardware
metrics.jsonl      one row of scalars per logged step
checkpoints/step-000500/
samples/           generated clips
stage1/            the trained network, of a Stage 1 training
result.json        final metrics, digests of the Stage 1 networks that were used, notes of what the
                   diagnosis and the generated clips gave warning of; its presence says that the
                   run is finished
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.recipe import dump, holds_recipe, load_run, shown_difference
from alignlab.stage1.config import Stage1Config


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
    def create(cls, config: RunConfig | Stage1Config) -> "RunFolder":
        """Makes the folder, or opens it to go on with the same recipe.

        Raises:
            UserError: it holds a run of another recipe.
        """
        folder = cls(Path(config.output) / config.name)
        if folder.recipe.exists() and not holds_recipe(folder.recipe, config):
            raise UserError(
                f"{folder.path} holds a run of another recipe "
                f"({shown_difference(folder.recipe, config)}): "
                "choose another name, or remove the folder"
            )
        folder.path.mkdir(parents=True, exist_ok=True)
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

    def config(self) -> RunConfig:
        """The recipe that the run was started with."""
        return load_run(self.recipe)

    def read_result(self) -> dict[str, Any] | None:
        """What `result.json` says, or None while the run is not finished."""
        if not self.result.exists():
            return None
        content: dict[str, Any] = json.loads(self.result.read_text())
        return content


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with named_errors(path):
            temporary.write_text(text)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` at the end, and goes away on an error.

    An existing `path` is replaced. What a killed process left behind is cleared first.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    remove_folder(temporary)
    temporary.mkdir(parents=True)
    try:
        with named_errors(path):
            yield temporary
            remove_folder(path)
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Makes the OSError of a failed write say where, in `filename`.

    Python leaves the name out where a file could be opened but not written; safetensors and
    `shutil.copytree` have the error number in their message alone.
    """
    try:
        yield
    except (SafetensorError, shutil.Error) as error:
        number = re.search(r"(?:os error |Errno )(\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def clear_leftovers(parent: Path) -> None:
    """Removes folders that a killed process left half written or half removed in `parent`."""
    for ending in ("tmp", "removed"):
        for leftover in parent.glob(f".*.{ending}"):
            if leftover.is_dir():
                shutil.rmtree(leftover)


def remove_folder(path: Path) -> None:
    """Removes a folder that may be gone; renamed first, so that none is ever half there."""
    if not path.exists():
        return
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)
