"""`alignlab data masks`. Heavy imports happen inside it."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignlab.cli_options import Overrides, Recipe, path_option
from alignlab.config.paths import user_path

if TYPE_CHECKING:
    from alignlab.config.data import FolderConfig
    from alignlab.masks.make import MaskSettings
    from alignlab.masks.segmenter import Segmenter

Backend = StrEnum("Backend", ["opencv", "sam2", "sam3"])  # typer takes no list of Literal


def masks(
    recipe: Recipe,
    overrides: Overrides = None,
    backend: Annotated[Backend, typer.Option(help="What finds the entities.")] = Backend.opencv,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Folder or hub id of its model (default: the backend's)."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        path_option("JSON file with entities, boxes and points by clip, in place of the rows'."),
    ] = None,
    from_references: Annotated[
        bool,
        typer.Option("--from-references", help="Look for each reference in the first frame."),
    ] = False,
    name: Annotated[
        str, typer.Option(help="Folder of the masks inside the data set, and of its metadata.")
    ] = "masks",
    min_confidence: Annotated[
        float,
        typer.Option(min=0, max=1, help="An entity of less is undecided in a frame."),
    ] = 0.7,
    replace: Annotated[
        bool, typer.Option("--replace", help="Make masks anew that are there.")
    ] = False,
    out: Annotated[
        Path | None, path_option("Folder of the summary page (default: in the data set).")
    ] = None,
    shown: Annotated[int, typer.Option(min=0, help="Clips on the page, least sure first.")] = 24,
) -> None:
    """Make entity masks for a folder of clips, and a page that shows them."""
    from alignlab.config.data import FolderConfig
    from alignlab.errors import UserError
    from alignlab.experiments.data_preview import load_data
    from alignlab.masks.make import MaskSettings
    from alignlab.masks.prompts import read_prompts
    from alignlab.masks.registry import build_segmenter

    data, _ = load_data(recipe, overrides)
    if not isinstance(data, FolderConfig):
        raise UserError(
            f"data.name: {data.name} is no folder of clips; masks are made for data.name=folder"
        )
    if prompts is not None and from_references:
        raise UserError("--from-references and --prompts say both where entities are; keep one")
    segmenter = build_segmenter(backend, model)
    if from_references and segmenter.reads_texts:
        raise UserError(f"--from-references: the backend {backend} is asked by phrases; remove it")
    settings = MaskSettings(
        name=name,
        prompts=None if prompts is None else read_prompts(prompts),
        from_references=from_references,
        min_confidence=min_confidence,
        replace=replace,
    )
    _make(data, segmenter, settings, out, shown)


def _make(
    data: "FolderConfig",
    segmenter: "Segmenter",
    settings: "MaskSettings",
    out: Path | None,
    shown: int,
) -> None:
    """Makes the masks and the page, and says where they are."""
    from alignlab.experiments.masks_page import mask_sizes, write_masks_page
    from alignlab.masks.make import make_masks
    from alignlab.runs.out_paths import check_out_folder

    page_folder = user_path(data.path) / settings.name if out is None else out
    if out is not None:
        check_out_folder(out)
    made = make_masks(data, segmenter, settings)
    page = write_masks_page(made, data, page_folder, shown=shown)
    typer.echo(mask_sizes(made))
    typer.echo(f"metadata: {made.metadata}")
    typer.echo(f"page: {page}")
