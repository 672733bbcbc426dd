"""`alignlab data references`. Heavy imports happen inside it."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from alignlab.cli_options import Overrides, Recipe, path_option
from alignlab.config.paths import user_path

if TYPE_CHECKING:
    from alignlab.config.data import FolderConfig
    from alignlab.references.pairs import ReferenceSettings

PairKind = StrEnum("PairKind", ["regular", "cross", "mixed"])  # typer takes no list of Literal
SubjectBy = StrEnum("SubjectBy", ["name", "phrase"])

Pairs = Annotated[
    PairKind,
    typer.Option(help="Cut from other frames of the clip, from other clips, or from both."),
]
CrossShare = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Of mixed pairs: how often another clip is taken where one shows the subject.",
        show_default="0.23",
    ),
]
SameSubject = Annotated[
    SubjectBy,
    typer.Option(help="What the same subject of two clips shares: entity_names, or its phrase."),
]
Augment = Annotated[
    str,
    typer.Option(
        metavar="WHICH", help="none, refalign, or for example refalign,rotation=20,blur=0."
    ),
]
Versions = Annotated[
    int, typer.Option(min=1, help="Of each train clip, with references of its own.")
]
MinShare = Annotated[
    float, typer.Option(min=0, max=1, help="Of the frame: the least that a subject's box has.")
]
Most = Annotated[int, typer.Option(min=1, help="References of a clip: the largest ones.")]
OtherFramesOnly = Annotated[
    bool, typer.Option("--other-frames-only", help="No frame that the clip is trained on.")
]


def references(
    recipe: Recipe,
    overrides: Overrides = None,
    pairs: Pairs = PairKind.regular,
    cross_share: CrossShare = None,
    same_subject: SameSubject = SubjectBy.name,
    augment: Augment = "none",
    versions: Versions = 1,
    min_share: MinShare = 0.1,
    most: Most = 3,
    other_frames_only: OtherFramesOnly = False,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.")] = 0,
    name: Annotated[
        str, typer.Option(help="Folder of the references in the data set, and of its metadata.")
    ] = "crops",
    replace: Annotated[
        bool, typer.Option("--replace", help="Make references anew that are there.")
    ] = False,
    out: Annotated[
        Path | None, path_option("Folder of the summary page (default: in the data set).")
    ] = None,
    shown: Annotated[int, typer.Option(min=0, help="Clips on the page, smallest crop first.")] = 24,
) -> None:
    """Cut references for a folder of clips out of its videos by masks, and show them on a page."""
    from alignlab.config.data import FolderConfig
    from alignlab.errors import UserError
    from alignlab.experiments.data_preview import load_data
    from alignlab.references.augment import read_augmentations
    from alignlab.references.pairs import CROSS_SHARE, ReferenceSettings

    data, _ = load_data(recipe, overrides)
    if not isinstance(data, FolderConfig):
        raise UserError(
            f"data.name: {data.name} is no folder of clips; references are cut for data.name=folder"
        )
    if cross_share is not None and pairs != "mixed":
        raise UserError(f"--cross-share: nothing reads it with --pairs {pairs}; remove it")
    settings = ReferenceSettings(
        name=name,
        pairs=cast(Any, pairs.value),
        cross_share=CROSS_SHARE if cross_share is None else cross_share,
        same_subject=cast(Any, same_subject.value),
        versions=versions,
        augment=read_augmentations(augment),
        min_share=min_share,
        most=most,
        other_frames_only=other_frames_only,
        seed=seed,
        replace=replace,
    )
    _make(data, settings, out, shown)


def _make(
    data: "FolderConfig", settings: "ReferenceSettings", out: Path | None, shown: int
) -> None:
    """Makes the references and the page, and says where they are."""
    from alignlab.experiments.references_page import reference_counts, write_references_page
    from alignlab.references.make import make_references
    from alignlab.runs.out_paths import check_out_folder

    page_folder = user_path(data.path) / settings.name if out is None else out
    if out is not None:
        check_out_folder(out)
    made = make_references(data, settings)
    page = write_references_page(made, data, page_folder, shown=shown)
    for line in reference_counts(made):
        typer.echo(line)
    typer.echo(f"metadata: {made.metadata}")
    typer.echo(f"page: {page}")
