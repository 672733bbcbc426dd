"""Where a model lies on disk: a local folder, an asset of this package, or the hub's cache."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

import alignlab
from alignlab.config.paths import user_path
from alignlab.errors import UserError

_PACKAGE = Path(alignlab.__file__).resolve().parent
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def on_disk(source: str) -> Path | None:
    """The local folder or, failing that, the shipped asset (`assets/...`) of that name, if any."""
    shipped = [_PACKAGE / source] if source.startswith("assets/") else []
    folders = (folder for folder in (user_path(source), *shipped) if folder.is_dir())
    return next(folders, None)


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
