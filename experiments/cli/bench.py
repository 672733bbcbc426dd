"""The commands under `alignlab bench`. Heavy imports happen inside them."""

from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from alignlab.cli_options import Overrides, path_option
from alignlab.config.paths import user_path

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)

# typer takes no list of Literal
KernelOp = StrEnum("KernelOp", ["pull_push", "relation", "local_gram"])

Device = Annotated[
    Literal["cpu", "cuda"] | None, typer.Option(help="(default: cuda if there is one)")
]
KernelOps = Annotated[
    list[KernelOp] | None, typer.Option(help="Repeat it for more (default: all).")
]
KernelProviders = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="floor, eager, compile, chunked, triton, an installed one (alignlab doctor), or a "
        "function as module:function. Repeat it for more (default: all that can run here).",
    ),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="(default: bfloat16 on cuda, float32 on a CPU)"),
]
Figures = Annotated[Path | None, path_option("JSON file for the figures.")]


@bench_app.command("overhead")
def overhead(
    recipe: Annotated[str, typer.Argument(help="A run without objectives.")] = "overhead",
    overrides: Overrides = None,
    pairs: Annotated[int, typer.Option(min=1, help="Timed pairs of steps.")] = 40,
    out: Figures = None,
) -> None:
    """Time a training step against a bare forward, backward and AdamW step."""
    from alignlab.recipe import load_run

    config = load_run(recipe, overrides)
    from alignlab.experiments.bench.overhead import measure_overhead, write_overhead

    with _figures(out):
        result = measure_overhead(config, pairs=pairs)
        typer.echo(
            f"harness {result.harness_s:.4f} s, bare {result.bare_s:.4f} s per step (medians), "
            f"ratio {result.ratio:.3f} (median of {result.pairs} pairs)"
        )
        if out is not None:
            write_overhead(result, out)
            typer.echo(f"figures: {out}")


@bench_app.command("kernels")
def kernels(
    op: KernelOps = None,
    impl: KernelProviders = None,
    device: Device = None,
    dtype: Dtype = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="Subjects or frames x tokens of each, such as 3x1560,4x1560."),
    ] = None,
    widths: Annotated[str, typer.Option(help="Channels of student and teacher.")] = "768,1024",
    blocks: Annotated[str, typer.Option(help="Blocks that pull_push aligns.")] = "1,9",
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="For each case, mode and impl (default: 5; cuda: 0.5)."),
    ] = None,
    max_gflop: Annotated[
        float | None,
        typer.Option(min=0, help="Leave out larger cases (default: 600; cuda: no limit)."),
    ] = None,
    max_gib: Annotated[
        float | None,
        typer.Option(min=0, help="Leave out eager and compile above (default: 8; cuda: no limit)."),
    ] = None,
    out: Annotated[Path, path_option("Folder.")] = Path("runs/kernels"),
    install: Annotated[
        bool, typer.Option("--install", help="impl=auto on this GPU then takes the fastest.")
    ] = False,
) -> None:
    """Measure speed and memory of the similarity kernels, after checking what they compute."""
    import torch

    from alignlab.experiments.bench import kernels as bench
    from alignlab.kernels.bench.cases import OPS
    from alignlab.kernels.bench.run import PROVIDERS

    named = impl or []
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = bench.KernelBench(
        device=torch.device(name),
        dtype=getattr(torch, dtype or ("bfloat16" if name == "cuda" else "float32")),
        seconds=bench.DEFAULT_SECONDS[name] if seconds is None else seconds,
        max_gflop=bench.DEFAULT_MAX_GFLOP[name] if max_gflop is None else max_gflop,
        max_gib=bench.DEFAULT_MAX_GIB[name] if max_gib is None else max_gib,
        ops=tuple(one for one in OPS if one in (op or OPS)),
        sizes=bench.parse_sizes(sizes) if sizes else (),
        widths=bench.parse_numbers("--widths", widths),
        blocks=bench.parse_numbers("--blocks", blocks),
        providers=tuple(dict.fromkeys([*(one for one in PROVIDERS if one in named), *named])),
    )
    from alignlab.runs.out_paths import out_folder

    if install:
        bench.check_installable(settings)
    with out_folder(out):
        figures = bench.bench_kernels(settings, out)
        bench.print_figures(figures)
        if install:
            typer.echo(f"installed for impl=auto: {bench.install_rows(figures.rows)}")


@bench_app.command("compare")
def compare(
    old: Annotated[Path, typer.Argument(parser=user_path, metavar="OLD.csv")],
    new: Annotated[Path, typer.Argument(parser=user_path, metavar="NEW.csv")],
    fail_above: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Exit with 1 if a ratio's interval, over that of floor if known, lies above, such "
            "as 1.05.",
        ),
    ] = None,
    out: Annotated[Path, path_option("Folder for the ratios and their plots.")] = Path(
        "runs/kernels-compare"
    ),
) -> None:
    """Compare two tables of `bench kernels`: new time and memory over old, with intervals."""
    from alignlab.experiments.bench import kernel_ratios
    from alignlab.experiments.bench.kernel_ratio_plots import draw_ratios
    from alignlab.experiments.report.escaping import one_visible_line
    from alignlab.runs.out_paths import out_folder

    with out_folder(out):
        ratios = kernel_ratios.compare_tables(old, new)
        kernel_ratios.print_ratios(ratios)
        table = kernel_ratios.write_ratios(ratios, out)
        for path in (table, *draw_ratios(ratios.ratios, fail_above, out)):
            typer.echo(f"written: {path}")
    failed = ratios.above(fail_above) if fail_above is not None else []
    for one in failed:
        own = f", {one.own} before the floor's {one.floor} is divided out" if one.floor else ""
        line = f"above {fail_above:g}: {ratios.named(one)}: {one.judged}{own}"
        typer.echo(one_visible_line(line), err=True)
    if failed:
        raise typer.Exit(1)


@bench_app.command("share")
def share(
    size: Annotated[
        Literal["wan2.1-1.3b", "smoke"], typer.Option(help="Transformer with random weights.")
    ] = "wan2.1-1.3b",
    impl: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="eager, chunked, triton or an installed one (alignlab doctor). Repeat it for more "
            "(default: eager chunked; cuda: triton as well).",
        ),
    ] = None,
    references: Annotated[int, typer.Option(min=1, help="Reference images.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each side.")] = 10,
    device: Device = None,
    out: Figures = None,
) -> None:
    """Time the alignment loss's share of a training step, by implementation of its kernel."""
    import torch

    from alignlab.experiments.bench.loss_share import SIZES, check_impls, measure_share, write_share

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    impls = check_impls(impl or ["eager", "chunked", *(["triton"] if name == "cuda" else [])])
    with _figures(out):
        shares = measure_share(
            SIZES[size],
            impls,
            references=references,
            steps=steps,
            device=torch.device(name),
        )
        for side in shares:
            typer.echo(f"{side.side}: {side.step_s:.4f} s per step, loss {side.share:.1%} of it")
        if out is not None:
            write_share(shares, size, out)
            typer.echo(f"figures: {out}")


@bench_app.command("gpu-report")
def gpu_report(
    device: Device = None,
    size: Annotated[
        Literal["full", "smoke"], typer.Option(help="Wan 1.3B's real sizes, or tiny ones.")
    ] = "full",
    minutes: Annotated[float, typer.Option(min=0.5, help="It ends within.")] = 9.0,
    out: Annotated[Path, path_option("Folder.")] = Path("runs/gpu-report"),
) -> None:
    """Measure in minutes what is open on this GPU, and write one small folder to bring back."""
    import torch

    from alignlab.experiments.bench import gpu_report as report
    from alignlab.runs.out_paths import out_folder

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with out_folder(out):
        outcomes = report.gpu_report(out, device=name, size=size, minutes=minutes)
    raise typer.Exit(report.print_outcomes(outcomes, out))


def _figures(out: Path | None) -> AbstractContextManager[None]:
    """Held while figures are measured that will be written at `out`."""
    from alignlab.runs.out_paths import out_file

    return nullcontext() if out is None else out_file(out, ".json")
