"""The table of data sets. Imports no class of clips: a recipe is checked without it.

Other packages add theirs by entry points (docs/own-data.md). One that cannot be used is a line of
text: it is told where a recipe names it, and keeps nothing else from running.
"""

import inspect
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast

from pydantic import BeforeValidator, Field

from alignlab.config.data import ClipsConfig, FolderConfig, ShapesConfig
from alignlab.data.own import CheckedClips, OwnClips, OwnClipsConfig
from alignlab.data.sample import ClipDataset, DataFiles
from alignlab.errors import UserError
from alignlab.foreign_code import call_foreign
from alignlab.kernels.plugins import NAME, NAME_RULE
from alignlab.losses.plugins import InstalledRow, Registration, lacks_name, look_up

GROUP = "alignlab.data"
"""Entry point group under which other packages register data sets."""


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
        package: name and version of the package that registers it; its class is an `OwnClips`, and
            has `files` itself. Empty for alignlab's own.
    """

    config: type[ClipsConfig]
    dataset: str
    files: str | None = None
    package: str = ""


BUILT_IN: dict[str, DatasetRow] = {
    "shapes": DatasetRow(ShapesConfig, "alignlab.data.shapes.dataset:ShapesDataset"),
    "folder": DatasetRow(
        FolderConfig,
        "alignlab.data.folder:FolderDataset",
        files="alignlab.data.folder_files:folder_files",
    ),
}

if TYPE_CHECKING:
    DataConfig = ClipsConfig

DATASETS: dict[str, DatasetRow]
"""`BUILT_IN` and what installed packages add, looked up at its first use, as `DataConfig` is."""


@cache
def installed_datasets() -> tuple[InstalledRow[DatasetRow], ...]:
    """What packages register, in the order of names; what cannot be used has a problem."""
    rows = []
    for one in look_up(GROUP, "data set", BUILT_IN):
        problem = one.problem
        if problem is None and (reason := _problem(one)) is not None:
            problem = one.told(reason)
        row = None
        if problem is None:
            clips = cast(type[OwnClips], one.loaded)
            place = f"{clips.__module__}:{clips.__qualname__}"
            row = DatasetRow(clips.Config, place, package=f"{one.package} {one.version}")
        rows.append(InstalledRow(one.name, one.package, one.version, row, problem))
    return tuple(rows)


def _problem(one: Registration) -> str | None:
    """Says what keeps a thing from being a data set."""
    clips = one.loaded
    if not re.fullmatch(NAME, one.name):
        return f"has a name that is none: {NAME_RULE}"
    if not (isinstance(clips, type) and issubclass(clips, OwnClips)):
        return "is no class derived from alignlab.data.own.OwnClips"
    if inspect.isabstract(clips):
        return f"lacks {', '.join(sorted(clips.__abstractmethods__))}"
    config = getattr(clips, "Config", None)
    if not (isinstance(config, type) and issubclass(config, OwnClipsConfig)):
        return "has no Config derived from alignlab.data.own.OwnClipsConfig"
    says_origin = clips.origin is not OwnClips.origin
    if config.clips_are_cached and not says_origin:
        return (
            "says nothing of what its clips are made from, so that nothing of them can be cached: "
            "write origin, or put clips_are_cached: ClassVar[bool] = False into its Config"
        )
    if says_origin and not config.clips_are_cached:
        return "has an origin, and a Config with clips_are_cached = False: remove one of them"
    return lacks_name(config, one.name)


@cache
def dataset_rows() -> dict[str, DatasetRow]:
    """Gives `BUILT_IN` and what installed packages add, looked up at the first call."""
    return BUILT_IN | {one.name: one.row for one in installed_datasets() if one.row is not None}


def _refuse_unusable(values: Any) -> Any:
    """Tells what is wrong with the data set of a package that a recipe names."""
    name = values.get("name") if isinstance(values, dict) else None
    for one in installed_datasets():
        if one.name == name and one.problem is not None and name not in dataset_rows():
            raise ValueError(one.problem)
    return values


@cache
def _data_config() -> Any:
    return Annotated[
        Union[tuple(row.config for row in dataset_rows().values())],  # noqa: UP007
        Field(discriminator="name"),
        BeforeValidator(_refuse_unusable),
    ]


def __getattr__(name: str) -> object:
    if name == "DATASETS":
        return dataset_rows()
    if name == "DataConfig":
        return _data_config()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def dataset_files(config: ClipsConfig) -> DataFiles | None:
    """The files that a data set reads; see `DatasetRow.files`.

    Raises:
        UserError: as the data set's function, such as bad metadata.
    """
    row = dataset_rows()[config.name]
    if row.package:
        what = f"data {config.name} ({row.package}): its files"
        found = call_foreign(what, pkgutil.resolve_name(row.dataset).files, config)
        if not (found is None or isinstance(found, DataFiles)):
            raise UserError(f"{what}: gave a {type(found).__name__}, not DataFiles or None")
        return found
    if row.files is None:
        return None
    return cast(DataFiles | None, pkgutil.resolve_name(row.files)(config))


def build_dataset(
    config: ClipsConfig, split: Literal["train", "val"], *, memory: Path | None = None
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
    row = dataset_rows()[config.name]
    dataset = pkgutil.resolve_name(row.dataset)
    if row.package:
        what = f"data {config.name} ({row.package}), split {split}"
        return CheckedClips(call_foreign(what, dataset, config, split), row.package)
    if row.files is not None:
        return cast(ClipDataset, dataset(config, split, memory))
    return cast(ClipDataset, dataset(config, split))


def build_splits(config: ClipsConfig, *, memory: Path) -> tuple[ClipDataset, ClipDataset]:
    """The train and the val split, as `build_dataset` gives them."""
    train = build_dataset(config, "train", memory=memory)
    return train, build_dataset(config, "val", memory=memory)
