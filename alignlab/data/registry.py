"""The table of data sets. Imports no code of theirs: a recipe is checked without it."""

import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Union, cast

from pydantic import Field

from alignlab.config.data import ClipsConfig, FolderConfig, ShapesConfig
from alignlab.data.sample import ClipDataset


@dataclass(frozen=True)
class DatasetRow:
    """One data set.

    Args:
        config: its settings; `name` is a literal, equal to the row's key.
        dataset: `module:class` of its clips, a `ClipDataset` built from config and split. Imported
            where clips are read.
        has_files: files of the user's are read: the class also takes `memory`, a folder where it
            may keep what a check of them found.
    """

    config: type[ClipsConfig]
    dataset: str
    has_files: bool = False


DATASETS: dict[str, DatasetRow] = {
    "shapes": DatasetRow(ShapesConfig, "alignlab.data.shapes.dataset:ShapesDataset"),
    "folder": DatasetRow(FolderConfig, "alignlab.data.folder:FolderDataset", has_files=True),
}

if TYPE_CHECKING:
    DataConfig = ClipsConfig
else:
    DataConfig = Annotated[
        Union[tuple(row.config for row in DATASETS.values())],  # noqa: UP007
        Field(discriminator="name"),
    ]


def build_dataset(
    config: DataConfig, split: Literal["train", "val"], *, memory: Path | None = None
) -> ClipDataset:
    """The data set that `config.name` says.

    Args:
        config: its settings.
        split: which clips.
        memory: folder, such as a recipe's `output`, that keeps what a check of the data's files
            found, so that they are decoded for it once; None: it is not kept.

    Raises:
        UserError: as the data set's constructor.
    """
    row = DATASETS[config.name]
    dataset = pkgutil.resolve_name(row.dataset)
    if row.has_files:
        return cast(ClipDataset, dataset(config, split, memory))
    return cast(ClipDataset, dataset(config, split))


def build_splits(config: DataConfig, *, memory: Path) -> tuple[ClipDataset, ClipDataset]:
    """The train and the val split, as `build_dataset` gives them."""
    train = build_dataset(config, "train", memory=memory)
    return train, build_dataset(config, "val", memory=memory)
