"""Commands on a run that is there already. Heavy imports happen inside them, as in `cli.py`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from alignlab.cli_options import CheckpointStep, Ema, Overrides, RunFolder, path_option
from alignlab.cli_tables import print_table
from alignlab.errors import UserError


def evaluate(
    run: RunFolder,
    overrides: Overrides = None,
    checkpoint: CheckpointStep = None,
    ema: Ema = None,
    out: Annotated[
        Path | None, path_option("JSON file to write (default: RUN/evaluations/step-*.json).")
    ] = None,
) -> None:
    """Evaluate a checkpoint of a run, also with other settings: eval.clips=64."""
    from alignlab.evaluation.evaluate_run import evaluate_to_file
    from alignlab.runs.out_paths import check_out_file
    from alignlab.training.checkpoint import ModelChoice

    if out is not None:
        check_out_file(out, ".json")
    choice = ModelChoice(checkpoint, ema)
    found, written = evaluate_to_file(run, overrides or (), choice=choice, out=out)
    rows = [(name, f"{value:.4g}") for name, value in found.metrics.items()]
    print_table(("metric", f"step {found.step}"), rows)
    typer.echo(f"evaluation: {written}")


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
    checkpoint: CheckpointStep = None,
    ema: Ema = None,
) -> None:
    """Generate a video with the model of a run."""
    for path in reference or ():
        if not path.is_file():
            raise UserError(f"--reference: no such file: {path}")
    from alignlab.sampling import sample_to_file
    from alignlab.training.checkpoint import ModelChoice

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
        choice=ModelChoice(checkpoint, ema),
    )
    typer.echo(f"video: {written}")


def export(
    run: RunFolder,
    out: Annotated[Path | None, path_option("Folder to write (default: RUN/export).")] = None,
    format: Annotated[
        Literal["diffusers", "peft", "comfyui", "musubi"],  # as `alignlab.lora_formats` has them
        typer.Option(help="Whose keys a LoRA has; all but diffusers' go to RUN/export-FORMAT."),
    ] = "diffusers",
    checkpoint: CheckpointStep = None,
    ema: Ema = None,
) -> None:
    """Write the trained model as a diffusers pipeline folder (or a LoRA) that needs no alignlab."""
    from alignlab.export import export as write
    from alignlab.training.checkpoint import ModelChoice

    typer.echo(f"exported: {write(run, out, ModelChoice(checkpoint, ema), format)}")


def repro(
    run: RunFolder,
    output: Annotated[str, typer.Option(help="Where the commands make it again.")] = "repro",
) -> None:
    """Print the commands that make a run again: code, packages, each part of its training."""
    from alignlab.repro import repro_commands

    for line in repro_commands(run, output):
        typer.echo(line)
