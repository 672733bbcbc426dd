"""Where a model lies on disk: a local folder, an asset of this package, or the hub's cache."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from alignlab.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    folder = Path(source).expanduser()
    if not folder.is_dir() and source.startswith("assets/"):
        folder = _PACKAGE / source
    if not folder.is_dir():
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
