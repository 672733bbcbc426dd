"""The table of data sets."""

from collections.abc import Callable
from typing import Any, Literal

from alignlab.config.data import DataConfig
from alignlab.data.folder import FolderDataset
from alignlab.data.sample import ClipDataset
from alignlab.data.shapes.dataset import ShapesDataset

DATASETS: dict[str, Callable[[Any, Literal["train", "val"]], ClipDataset]] = {
    "shapes": ShapesDataset,
    "folder": FolderDataset,
}


def build_dataset(config: DataConfig, split: Literal["train", "val"]) -> ClipDataset:
    """The data set that `config.name` says.

    Raises:
        UserError: as the data set's constructor.
    """
    return DATASETS[config.name](config, split)
