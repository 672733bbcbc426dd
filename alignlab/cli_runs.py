"""Commands on a run that is there already. Heavy imports happen inside them, as in `cli.py`."""

from pathlib import Path
from typing import Annotated

import typer

from alignlab.cli_options import RunFolder, path_option
from alignlab.errors import UserError


def sample(
    run: RunFolder,
    prompt: Annotated[str, typer.Option(help="What the video shows.")],
    reference: Annotated[
        list[Path] | None,
        path_option("Image of a subject on white; repeat it for more subjects."),
    ] = None,
    out: Annotated[Path, path_option("The video to write, .mp4.")] = Path("sample.mp4"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps (default: the recipe's).")
    ] = None,
    text_guidance: Annotated[
        float | None, typer.Option(min=0, help="(default: the recipe's)")
    ] = None,
    reference_guidance: Annotated[
        float | None, typer.Option(min=0, help="(default: the recipe's)")
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="What the video should not show, or 'wan' (default: the recipe's)."),
    ] = None,
) -> None:
    """Generate a video with the model of a run."""
    for path in reference or ():
        if not path.is_file():
            raise UserError(f"--reference: no such file: {path}")
    from alignlab.sampling import sample_to_file

    written = sample_to_file(
        run,
        prompt,
        tuple(reference or ()),
        out,
        seed=seed,
        steps=steps,
        text_guidance=text_guidance,
        reference_guidance=reference_guidance,
        negative_prompt=negative_prompt,
    )
    typer.echo(f"video: {written}")


def export(
    run: RunFolder,
    out: Annotated[Path | None, path_option("Folder to write (default: RUN/export).")] = None,
) -> None:
    """Write the trained model as a diffusers pipeline folder (or a LoRA) that needs no alignlab."""
    from alignlab.export import export as write

    typer.echo(f"exported: {write(run, out or run / 'export')}")


def repro(
    run: RunFolder,
    output: Annotated[str, typer.Option(help="Where the commands make it again.")] = "repro",
) -> None:
    """Print the commands that make a run again: code, packages, each part of its training."""
    from alignlab.repro import repro_commands

    for line in repro_commands(run, output):
        typer.echo(line)
