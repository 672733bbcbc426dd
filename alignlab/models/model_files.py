"""Where a model lies on disk, and the one door through which its files are loaded.

A model is in a local folder, an asset of this package, or the hub's cache. Its files are looked at
before a library reads them, so that a damaged one is named.
"""

import json
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open

import alignlab
from alignlab.config.paths import user_path
from alignlab.errors import UserError, first_line, one_line

_PACKAGE = Path(alignlab.__file__).resolve().parent
_POINTER = b"version https://git-lfs.github.com/spec/"
_SHARD_LIST = ".safetensors.index.json"
_CONFIGS = ("config.json", "tokenizer.json", "model_index.json", _SHARD_LIST)
"""Ends of the names of JSON files that hold an object."""
_LOAD_ERRORS = (
    OSError,
    SafetensorError,
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ZeroDivisionError,
)
"""What diffusers and transformers raise on settings and weights that fit nothing."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_thread = threading.local()


class NotLoadedError(Exception):
    """A model is needed, and this thread loads none."""


def load_nothing_here() -> None:
    """This thread loads no model from now on: `load_pretrained` raises `NotLoadedError` in it.

    The libraries set the process's default dtype while they load: what another thread makes
    meanwhile would have it.
    """
    _thread.loads_nothing = True


def check_may_load(source: Path) -> None:
    """Refuses to load a model in a thread that is to load none.

    Raises:
        NotLoadedError: this is such a thread.
    """
    if getattr(_thread, "loads_nothing", False):
        raise NotLoadedError(str(source))


def on_disk(source: str) -> Path | None:
    """The local folder or, failing that, the shipped asset (`assets/...`) of that name, if any."""
    shipped = [_PACKAGE / source] if source.startswith("assets/") else []
    folders = (folder for folder in (user_path(source), *shipped) if folder.is_dir())
    return next(folders, None)


def is_relative(source: str) -> bool:
    """Whether a model's or data set's name depends on the current folder: no asset, no hub id.

    What may be either counts as a folder if there is one.
    """
    if user_path(source).is_absolute() or source.startswith("assets/"):
        return False
    return user_path(source).exists() or not _HUB_ID.fullmatch(source)


def present_folder(source: str) -> Path | None:
    """`on_disk`, or what the hub's cache holds of a hub id; never uses the network."""
    folder = on_disk(source)
    if folder is not None or not _HUB_ID.fullmatch(source):
        return folder
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, HFValidationError):
        return None


def local_folder(source: str, *, setting: str, marker: str, patterns: Sequence[str]) -> Path:
    """The folder that holds a model's files. The network is used only if `source` is no folder.

    Args:
        source: a local folder, an asset shipped with the package (`assets/...`), or a Hugging
            Face hub id (`owner/name`). The first of these that exists is taken.
        setting: the recipe key that `source` came from, for the error message.
        marker: a file that every such folder has, e.g. `model_index.json`.
        patterns: what to fetch from the hub; only safetensors, JSON and tokenizer files are ever
            asked for, so that no pickle is loaded.

    Raises:
        UserError: neither a folder nor a reachable hub id, or the marker file is missing.
    """
    folder = on_disk(source)
    if folder is None:
        if source.startswith("assets/") or not _HUB_ID.fullmatch(source):
            raise UserError(f"{setting}: {source}: no such folder, shipped asset or hub id")
        try:
            folder = Path(snapshot_download(source, allow_patterns=list(patterns)))
        except (OSError, HFValidationError) as error:
            raise UserError(
                f"{setting}: {source} is neither a local folder nor a hub id that can be reached "
                f"({type(error).__name__}); download it first or fix the path"
            ) from error
    if not (folder / marker).is_file():
        raise UserError(f"{setting}: {source} has no {marker}")
    return folder


def load_pretrained(
    loader: Any, folder: Path, *, setting: str, config_file: str = "config.json", **options: Any
) -> Any:
    """`loader.from_pretrained(folder)` without network, of files that were looked at before.

    What the libraries print of weights that fit badly is left out: it is for the caller to check.

    Args:
        loader: a class of diffusers or transformers.
        folder: of the model or of one part of a pipeline.
        setting: the recipe key that it came from, for messages.
        config_file: which has to be there: without it the libraries take a default.
        options: of `from_pretrained`; a `state_dict` stands for the folder's weights.

    Raises:
        UserError: a file is damaged, or what the files hold fits the class not.
        NotLoadedError: this thread is to load nothing (`load_nothing_here`).
    """
    check_may_load(folder)
    check_model_files(folder, setting=setting)
    read_object(folder / config_file, setting=setting)
    source = None if "state_dict" in options else folder
    try:
        with _quiet_loading():
            return loader.from_pretrained(source, local_files_only=True, **options)
    except _LOAD_ERRORS as error:
        raise UserError(
            f"{setting}: cannot load {folder}: {first_line(error) or type(error).__name__}"
        ) from error


def construct(model_class: Any, folder: Path, *, setting: str) -> Any:
    """A diffusers model of a folder's config.json, with the weights that its class draws.

    Args:
        model_class: of diffusers.
        folder: of the model or of one part of a pipeline; its weights are not read.
        setting: the recipe key that it came from, for messages.

    Raises:
        UserError: the settings are damaged, or fit the class not.
    """
    settings = read_object(folder / "config.json", setting=setting)
    try:
        with _quiet_loading():
            return model_class.from_config(settings)
    except _LOAD_ERRORS as error:
        raise UserError(
            f"{setting}: cannot build {folder}: {first_line(error) or type(error).__name__}"
        ) from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silences both libraries' tables and messages, of weights and of files that are missing."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    kept = []
    for name, library in (("diffusers", of_diffusers), ("transformers", of_transformers)):
        library.get_verbosity()  # its logger has its handler from here on
        logger = logging.getLogger(name)
        kept.append((logger, logger.handlers, logger.propagate))
    # A logger's level would do as well, but to set one empties what all loggers remember of theirs.
    for logger, _, _ in kept:
        logger.handlers, logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        for logger, handlers, propagate in kept:
            logger.handlers, logger.propagate = handlers, propagate


def check_model_files(folder: Path, *, setting: str) -> None:
    """Refuses a model's folder in which a file is damaged, as far as that shows without reading it.

    Seen are Git-LFS pointers, empty and cut safetensors files (their header says their length),
    shards that are missing, and JSON files that are none.

    Raises:
        UserError: it names the file and the fix.
    """
    for path in sorted(folder.iterdir()):
        problem = _problem(path)
        if problem is not None:
            raise UserError(f"{setting}: {path} {problem}")


def read_object(path: Path, *, setting: str) -> dict[str, Any]:
    """What a JSON file of a model holds.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    problem = _problem(path)
    if problem is None and not path.is_file():
        problem = "is missing: fetch it again"
    if problem is not None:
        raise UserError(f"{setting}: {path} {problem}")
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _problem(path: Path) -> str | None:
    """What is wrong with a file of a model, with the fix."""
    again = "fetch it again"
    is_json, is_weights = path.suffix == ".json", path.suffix == ".safetensors"
    if path.is_dir():
        return f"is a folder, not a file: {again}" if is_json or is_weights else None
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
        if begin == _POINTER:
            return "is a Git-LFS pointer, not the file itself: run `git lfs pull` in its folder"
        if not begin and (is_json or is_weights):
            return f"is empty: {again}"
        if is_weights:
            with safe_open(path, "pt"):
                pass
        elif is_json:
            return _json_problem(path, again)
    except OSError as error:
        return f"cannot be read: {error.strerror or one_line(error)}"
    except SafetensorError as error:
        return f"is damaged ({one_line(error)}): {again}"
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({one_line(error)}): {again}"
    return None


def _json_problem(path: Path, again: str) -> str | None:
    content = json.loads(path.read_text("utf-8"))
    if path.name.endswith(_CONFIGS) and not isinstance(content, dict):
        return f"holds a {type(content).__name__} where an object {{...}} has to be: {again}"
    if path.name.endswith(_SHARD_LIST):
        shards = content.get("weight_map")
        if not isinstance(shards, dict):
            return f"has no weight_map: {again}"
        missing = sorted({str(v) for v in shards.values() if not (path.parent / str(v)).is_file()})
        if missing:
            return f"names {missing[0]}, which is not there: {again}"
    return None
