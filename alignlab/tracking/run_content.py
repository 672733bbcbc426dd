"""What MLflow gets of a run besides its rows: files, clips, and what the run read."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from alignlab.config.identity import settings_hash
from alignlab.config.parts import TrainingConfig
from alignlab.runs.checksums import DamagedError
from alignlab.runs.input_record import InputRecord, RecordedInput
from alignlab.runs.run_folder import RunFolder

log = logging.getLogger(__name__)

MAX_DIGEST = 36  # MLflow's own limit
DIGEST = "alignlab.digest."  # begins the tag of what a run reads besides clips
DATA = "data"
CLIPS = ("samples.json", "[0-9]*.mp4")
# Settings of data sets that change no clip.
CHANGES_NO_CLIP = {"cache": True, "workers": True, "prefetch": True}


class DatasetFacts(NamedTuple):
    """A data set as MLflow shows it.

    Args:
        name: of it in the recipe.
        digest: of the files that it is read from; of generated clips that of their settings.
        source: where it is from, as JSON.
    """

    name: str
    digest: str
    source: str


def datasets(folder: RunFolder, config: TrainingConfig) -> list[DatasetFacts]:
    """The data set that a run is trained and evaluated on."""
    settings = settings_hash(config.data, CHANGES_NO_CLIP)
    source = {"name": config.data.name, "settings": settings}
    digest, recorded = settings, recorded_inputs(folder, config).get(DATA)
    if recorded is not None:
        digest = recorded.digest
        source |= {"source": recorded.source, "files": str(recorded.num_files), "sha256": digest}
    return [DatasetFacts(config.data.name, digest[:MAX_DIGEST], json.dumps(source))]


def digest_tags(folder: RunFolder, config: TrainingConfig) -> dict[str, str]:
    """Tags with the digests of models, teachers and what else a run reads."""
    recorded = recorded_inputs(folder, config)
    return {f"{DIGEST}{name}": one.digest for name, one in recorded.items()}


def recorded_inputs(folder: RunFolder, config: TrainingConfig) -> Mapping[str, RecordedInput]:
    """What a run reads, by name; of a damaged record nothing, which is told."""
    try:
        record = InputRecord(folder.path, config.output)
    except DamagedError as error:
        log.warning("%s", error)
        return {}
    return {one.name: one for one in record.inputs.values()}


def run_files(folder: RunFolder) -> list[Path]:
    """Recipe, result and the clips that the run generated, also those while it trained.

    The real clips and references beside them are the same for every run on the data set.
    """
    clips = [path for pattern in CLIPS for path in folder.samples.rglob(pattern)]
    is_generated = [path for path in sorted(clips) if "-" not in path.name]
    return [folder.recipe, folder.result, *is_generated]
