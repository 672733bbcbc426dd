"""The table of data sets. Imports no code of theirs: a recipe is checked without it."""

import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Union, cast

from pydantic import Field

from alignlab.config.data import ClipsConfig, FolderConfig, ShapesConfig
from alignlab.data.sample import ClipDataset


class DataFiles(NamedTuple):
    """What a data set reads.

    Args:
        source: names it: equal where the same files are listed.
        root: their folder.
        files: by their names in there; a folder stands for all files in it.
    """

    source: str
    root: Path
    files: dict[str, Path]


@dataclass(frozen=True)
class DatasetRow:
    """One data set.

    Args:
        config: its settings; `name` is a literal, equal to the row's key.
        dataset: `module:class` of its clips, a `ClipDataset` built from config and split. Imported
            where clips are read.
        files: `module:function` that gives, of the settings, the `DataFiles` which clips are read
            from, or None while they are not there. The class of clips then also takes `memory`, a
            folder where it may keep what a check of them found. None for clips that are generated.
    """

    config: type[ClipsConfig]
    dataset: str
    files: str | None = None


DATASETS: dict[str, DatasetRow] = {
    "shapes": DatasetRow(ShapesConfig, "alignlab.data.shapes.dataset:ShapesDataset"),
    "folder": DatasetRow(
        FolderConfig,
        "alignlab.data.folder:FolderDataset",
        files="alignlab.data.folder_files:folder_files",
    ),
}

if TYPE_CHECKING:
    DataConfig = ClipsConfig
else:
    DataConfig = Annotated[
        Union[tuple(row.config for row in DATASETS.values())],  # noqa: UP007
        Field(discriminator="name"),
    ]


def dataset_files(config: DataConfig) -> DataFiles | None:
    """The files that a data set reads; see `DatasetRow.files`.

    Raises:
        UserError: as the data set's function, such as bad metadata.
    """
    function = DATASETS[config.name].files
    if function is None:
        return None
    return cast(DataFiles | None, pkgutil.resolve_name(function)(config))


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
    if row.files is not None:
        return cast(ClipDataset, dataset(config, split, memory))
    return cast(ClipDataset, dataset(config, split))


def build_splits(config: DataConfig, *, memory: Path) -> tuple[ClipDataset, ClipDataset]:
    """The train and the val split, as `build_dataset` gives them."""
    train = build_dataset(config, "train", memory=memory)
    return train, build_dataset(config, "val", memory=memory)
