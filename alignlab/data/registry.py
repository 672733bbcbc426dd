"""The table of data sets. Imports no code of theirs: a recipe is checked without it."""

import pkgutil
from dataclasses import dataclass
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
    """

    config: type[ClipsConfig]
    dataset: str


DATASETS: dict[str, DatasetRow] = {
    "shapes": DatasetRow(ShapesConfig, "alignlab.data.shapes.dataset:ShapesDataset"),
    "folder": DatasetRow(FolderConfig, "alignlab.data.folder:FolderDataset"),
}

if TYPE_CHECKING:
    DataConfig = ClipsConfig
else:
    DataConfig = Annotated[
        Union[tuple(row.config for row in DATASETS.values())],  # noqa: UP007
        Field(discriminator="name"),
    ]


def build_dataset(config: DataConfig, split: Literal["train", "val"]) -> ClipDataset:
    """The data set that `config.name` says.

    Raises:
        UserError: as the data set's constructor.
    """
    dataset = pkgutil.resolve_name(DATASETS[config.name].dataset)
    return cast(ClipDataset, dataset(config, split))
