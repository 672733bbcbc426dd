"""Where the settings of a model are read that a recipe names, without its weights.

A folder on disk, what the hub's cache holds, files fetched from the hub where that is asked for,
and otherwise the architectures that alignlab ships (`assets/architectures.json`), which are written
into a folder of config.json files that everything else reads like any other.
"""

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

import alignlab
from alignlab.errors import UserError
from alignlab.models.experts import INDEX
from alignlab.models.model_files import on_disk, present_folder

SHIPPED = Path(alignlab.__file__).resolve().parent / "assets" / "architectures.json"
CONFIGS = (INDEX, "config.json", "*/config.json", "preprocessor_config.json")


class Architectures:
    """Folders with the settings of models; those that are written here last as long as it does.

    Args:
        stack: closed when they are no longer needed.
        fetch: ask the hub for what is not on this machine.

    Attributes:
        notes: what has to be said of where settings come from.
    """

    def __init__(self, stack: ExitStack, *, fetch: bool = False) -> None:
        self._stack = stack
        self._fetch = fetch
        self._written: dict[str, Path] = {}
        self.notes: list[str] = []

    def pipeline(self, source: str) -> Path:
        """The folder of a Wan pipeline, for `model.path`.

        Raises:
            UserError: its settings are nowhere.
        """
        return self._folder(source, "pipelines", "model.path", "vae/config.json")

    def teacher(self, source: str, setting: str) -> Path:
        """The folder of a teacher.

        Raises:
            UserError: its settings are nowhere.
        """
        return self._folder(source, "teachers", setting, "config.json")

    def _folder(self, source: str, table: str, setting: str, marker: str) -> Path:
        found = on_disk(source) or present_folder(source)
        if found is not None and (found / marker).is_file():
            return found
        if self._fetch:
            try:
                return Path(snapshot_download(source, allow_patterns=list(CONFIGS)))
            except (OSError, HFValidationError) as error:
                raise UserError(
                    f"{setting}: {source} is neither a local folder nor a hub id that can be "
                    f"reached ({type(error).__name__}); remove --fetch to plan without the hub"
                ) from error
        known = shipped()[table]
        if source not in known:
            raise UserError(
                f"{setting}: {source}: a plan needs its config.json, which is neither in a local "
                f"folder nor in the hub's cache; add --fetch to ask the hub for it, or name one "
                f"that alignlab knows: {', '.join(known)}"
            )
        if source not in self._written:
            self._written[source] = self._write(source, table)
            self.notes.append(
                f"{source}: architecture as shipped with alignlab, not read from the hub"
            )
        return self._written[source]

    def _write(self, source: str, table: str) -> Path:
        made = self._stack.enter_context(tempfile.TemporaryDirectory("-alignlab-plan"))
        folder = Path(made, source)  # messages end with its name
        folder.mkdir(parents=True)
        if table == "teachers":
            (folder / "config.json").write_text(json.dumps(shipped()[table][source]))
        else:
            for name, content in pipeline_files(shipped()[table][source]).items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(json.dumps(content))
        return folder


@cache
def shipped() -> Mapping[str, Mapping[str, Any]]:
    """What `assets/architectures.json` holds."""
    content: dict[str, dict[str, Any]] = json.loads(SHIPPED.read_text("utf-8"))
    return content


def pipeline_files(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON files of a pipeline folder that a plan reads, of a row of `pipelines`."""
    autoencoder = shipped()["autoencoders"][entry["vae"]]
    # of no matter to a cost, and not the model's own
    unscaled = {"latents_mean": [0.0], "latents_std": [1.0]}
    scaled = {key: value * autoencoder["z_dim"] for key, value in unscaled.items()}
    parts: dict[str, list[str | None]] = {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    files: dict[str, Any] = {
        "vae/config.json": autoencoder | scaled,
        "text_encoder/config.json": shipped()["text_encoders"][entry["text_encoder"]],
        "tokenizer/tokenizer_config.json": {},
        "scheduler/scheduler_config.json": {"_class_name": "UniPCMultistepScheduler"},
    }
    for part in ("transformer", "transformer_2"):
        if part in entry:
            files[f"{part}/config.json"] = shipped()["transformers"][entry[part]]
            parts[part] = ["diffusers", "WanTransformer3DModel"]
    files[INDEX] = {"_class_name": "WanPipeline", **parts, **entry.get("index", {})}
    return files
