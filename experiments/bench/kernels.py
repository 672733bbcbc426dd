"""The command `alignlab bench kernels`: which cases, in which order, checked first, written down.

The measuring itself is in `kernels/bench/`.
"""

import itertools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import alignlab
from alignlab.config.data import unknown_name
from alignlab.environment import (
    git_commit,
    own_kernel_rows,
    package_version,
    processor_name,
)
from alignlab.errors import UserError
from alignlab.experiments.bench.kernel_plots import draw_plots
from alignlab.kernels import speed_table
from alignlab.kernels.bench.cases import BLOCKS, OPS, WIDTHS, Case, Op, select_cases
from alignlab.kernels.bench.check import WrongResult, check
from alignlab.kernels.bench.csv_file import Row, read_rows, replace_rows, to_csv, to_row
from alignlab.kernels.bench.floor import minimum_flops
from alignlab.kernels.bench.run import (
    MODES,
    PROVIDERS,
    LeftOut,
    Measurement,
    Provider,
    is_function,
    measure,
    missing,
    num_steps,
    too_large,
)
from alignlab.kernels.plugins import FOREIGN, ImplementationError, raised
from alignlab.kernels.registry import OPERATIONS, installed_kernels
from alignlab.progress import Advance, step_progress
from alignlab.runs.atomic_files import write_text
from alignlab.runs.file_lock import file_lock

log = logging.getLogger(__name__)

CSV_NAME = "all_benchmark_data.csv"
HEADER = (
    "case",
    "impl",
    "forward ms (p20-p80)",
    "forward + backward ms",
    "x floor",
    "peak extra MiB",
)
DEFAULT_SECONDS = {"cpu": 5.0, "cuda": 0.5}
# On a CPU at some 100 GFLOP/s a case then takes minutes, and the memory is a laptop's. On CUDA
# everything is tried, and what does not fit into its memory is named.
DEFAULT_MAX_GFLOP = {"cpu": 600.0, "cuda": math.inf}
DEFAULT_MAX_GIB = {"cpu": 8.0, "cuda": math.inf}


@dataclass(frozen=True)
class KernelBench:
    """What to measure.

    Args:
        device: `cpu` or `cuda`.
        dtype: of student and teacher.
        ops: operations.
        sizes: (subjects, tokens) or (frames, tokens) in place of the table's, unless empty.
        widths: channels.
        blocks: blocks of `pull_push`.
        providers: what to measure: names, or functions as `module:function` that can be imported
            from the current folder; empty: all that can run here.
        seconds: time for each provider, case and mode.
        max_gflop: cases are left out whose matrix products, forward and backward, are more.
        max_gib: `eager` and `compile` are left out where their matrices are larger.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float
    max_gflop: float
    max_gib: float
    ops: tuple[Op, ...] = OPS
    sizes: tuple[tuple[int, int], ...] = ()
    widths: tuple[int, ...] = WIDTHS
    blocks: tuple[int, ...] = BLOCKS
    providers: tuple[Provider, ...] = ()


@dataclass(frozen=True)
class KernelFigures:
    """What was measured, what was not and why, and the files written."""

    measurements: tuple[Measurement, ...]
    left_out: tuple[LeftOut, ...]
    files: tuple[Path, ...]
    rows: tuple[Row, ...]


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Reads `3x1560,4x1560`: subjects or frames, and the tokens of each.

    Raises:
        UserError: it is something else.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise UserError(
            f"--sizes {text}: write sizes like 3x1560,24x150 (subjects or frames x tokens)"
        )
    return tuple((int(size.split("x")[0]), int(size.split("x")[1])) for size in text.split(","))


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Reads `768,1024`.

    Raises:
        UserError: it is something else.
    """
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UserError(f"{option} {text}: write numbers like 768,1024")
    return tuple(map(int, text.split(",")))


def bench_kernels(bench: KernelBench, out: Path) -> KernelFigures:
    """Checks every provider, measures it, and writes table and plots.

    Rows of earlier calls are kept in the table, unless the same thing was measured again on the
    same device with the same commit and versions; plots show those of this commit alone.

    Raises:
        UserError: a provider computes something wrong (no speed is reported then), one that was
            named cannot run, or no case is left.
    """
    if bench.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here")
    names = dict.fromkeys(_plain_name(provider, bench.ops) for provider in bench.providers)
    bench = replace(bench, providers=tuple(names))
    left_out: list[LeftOut] = []
    cases = _affordable(bench, left_out)
    _check_named(bench)
    if not bench.providers:
        left_out += [LeftOut(k.name, k.problem) for k in installed_kernels() if k.problem]
    present = {op: _present(op, bench, left_out) for op in bench.ops}
    cases = [case for case in cases if present[case.op]]
    # Once for each operation and width: what a kernel is compiled for.
    kinds = {(case.op, case.width): case for case in reversed(cases)}
    with step_progress("checks", total=sum(len(present[op]) for op, _ in kinds)) as advance:
        right = _check_all(kinds, present, bench, left_out, _counter(advance))
    jobs = [(case, _fitting(case, right[case.op, case.width], bench, left_out)) for case in cases]
    measured: list[Measurement] = []
    steps = sum(num_steps(providers) for _, providers in jobs)
    with step_progress("bench kernels", total=steps) as advance:
        advance_one = _counter(advance)
        for case, providers in jobs:
            figures, failed = measure(case, providers, bench.device, bench.seconds, advance_one)
            measured += figures
            left_out += failed
    facts = facts_of(bench.device)
    rows = [to_row(measurement, facts) for measurement in measured]
    files = _write(rows, facts, out)
    return KernelFigures(tuple(measured), tuple(left_out), tuple(files), tuple(rows))


def check_installable(bench: KernelBench) -> None:
    """Refuses to install what `impl: auto` could not go by.

    Raises:
        UserError: one line.
    """
    if bench.device.type != "cuda":
        raise UserError(
            f"--install: on {bench.device.type}, impl=auto goes by the number of tokens alone, so "
            "that a run has the same bits on every machine; it is for --device cuda"
        )
    if bench.providers and "chunked" not in bench.providers:
        raise UserError("--install: add --impl chunked, which the others are measured against")


def install_rows(rows: Iterable[Row]) -> Path:
    """Adds rows to those of this machine, which `impl: auto` goes by from the next command on.

    Rows of an earlier call stay unless the same thing was measured again. A file that cannot be
    read is replaced, and that is said.

    Returns:
        The file.
    """
    path = own_kernel_rows()
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_suffix(".lock"), waiting=lambda: f"waiting for {path}"):
        old: list[Row] = []
        if path.exists():
            try:
                old = speed_table.read(path)
            except ValueError as error:
                log.warning("%s is replaced, it could not be read: %s", path, error)
        write_text(path, to_csv(replace_rows(old, rows)))
    speed_table.table_of.cache_clear()
    return path


def print_figures(figures: KernelFigures) -> None:
    """Prints the table, what was left out, and the files."""
    table = Table(*HEADER)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in _table_rows(figures.measurements):
        table.add_row(*row)
    console = Console()
    console.print(table)
    for what, reason in figures.left_out:
        console.print(f"left out: {what}: {reason}", markup=False, highlight=False)
    for path in figures.files:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def _table_rows(measurements: Iterable[Measurement]) -> list[tuple[str, ...]]:
    spreads = {(m.case, m.provider, m.mode, m.metric): m.spread for m in measurements}
    rows = []
    providers = dict.fromkeys([*PROVIDERS, *(provider for _, provider, *_ in spreads)])
    for case, provider in product(dict.fromkeys(case for case, *_ in spreads), providers):
        if (case, provider, "full", "speed") not in spreads:
            continue
        speeds = [spreads[case, provider, mode, "speed"] for mode in MODES]
        floor = spreads.get((case, "floor", "full", "speed"))
        memory = spreads.get((case, provider, "full", "memory"))
        rows.append(
            (
                str(case),
                provider,
                *(f"{speed.median:.4g} ({speed.p20:.4g}-{speed.p80:.4g})" for speed in speeds),
                f"{speeds[-1].median / floor.median:.2f}" if floor else "",
                f"{memory.median:.4g}" if memory else "",
            )
        )
    return rows


def _counter(advance: Advance) -> Callable[[str], None]:
    """`advance` by one step at each call."""
    numbers = itertools.count(1)
    return lambda note: advance(next(numbers), note)


def _affordable(bench: KernelBench, left_out: list[LeftOut]) -> list[Case]:
    cases = select_cases(
        bench.ops, bench.dtype, sizes=bench.sizes, widths=bench.widths, blocks=bench.blocks
    )
    affordable = []
    for case in cases:
        gflop = minimum_flops(case, backward=True) / 1e9
        if gflop <= bench.max_gflop:
            affordable.append(case)
        else:
            reason = f"{gflop:,.0f} GFLOP, more than --max-gflop {bench.max_gflop:g}"
            left_out.append(LeftOut(str(case), reason))
    if not affordable:
        raise UserError(f"no case is left: {left_out[0].what} is {left_out[0].reason}")
    return affordable


def _plain_name(provider: Provider, ops: Sequence[Op]) -> Provider:
    """The name without the package, `name@package` as recipes have it: so tables can be joined."""
    if "@" not in provider or is_function(provider):
        return provider
    name, found, problems = provider.partition("@")[0], list[Op](), list[str]()
    for op in ops:
        try:
            OPERATIONS[op].full_name(provider)
            found.append(op)
        except KeyError:
            return provider  # and no name of anything
        except ImplementationError as error:
            problems.append(str(error))
    if not found:
        raise UserError(f"--impl {provider}: {problems[0]}")
    for op in ops:
        if op not in found and name in OPERATIONS[op].implementations():
            raise UserError(
                f"--impl {provider}: {name!r} of {op} is another package's; add --op {found[0]}"
            )
    return name


def _check_named(bench: KernelBench) -> None:
    """Refuses names of implementations that there are nowhere, before anything is computed."""
    installed = [one for one in installed_kernels() if one.kernel is not None]
    for provider in bench.providers:
        if provider in PROVIDERS:
            continue
        if is_function(provider):
            if len(bench.ops) > 1:
                choices = " or ".join(f"--op {op}" for op in bench.ops)
                raise UserError(f"--impl {provider}: say which operation it computes: {choices}")
            here = os.getcwd()
            if here not in sys.path:  # as `python -m` has it
                sys.path.insert(0, here)
            continue
        problems = [one.problem for one in installed_kernels() if one.name == provider]
        if any(one.name == provider for one in installed):
            continue
        if any(problems):
            raise UserError(next(filter(None, problems)))
        names = dict.fromkeys([*PROVIDERS, *(one.name for one in installed)])
        hint = unknown_name("implementation", provider, names)
        raise UserError(f"--impl {provider}: {hint}, or a function as module:function")


def _present(op: Op, bench: KernelBench, left_out: list[LeftOut]) -> list[Provider]:
    present: list[Provider] = []
    states = OPERATIONS[op].implementations()
    all_here = dict.fromkeys([*PROVIDERS, *states])
    for provider in bench.providers or all_here:
        try:
            reason = missing(op, provider, bench.device)
        except ImplementationError as error:
            raise UserError(f"--impl {provider}: {error}") from None
        if reason is None:
            present.append(provider)
            continue
        of_other_op = provider not in all_here and not is_function(provider)
        if bench.providers and not (of_other_op and len(bench.ops) > 1):
            raise UserError(f"--impl {provider}: {op} cannot run it here: {reason}")
        left_out.append(LeftOut(f"{provider} of {op}", reason))
    return present


def _fitting(
    case: Case, providers: list[Provider], bench: KernelBench, left_out: list[LeftOut]
) -> list[Provider]:
    reasons = {provider: too_large(case, provider, bench.max_gib) for provider in providers}
    for provider, reason in reasons.items():
        if reason is not None:
            left_out.append(LeftOut(f"{provider} on {case}", f"{reason} (--max-gib)"))
    return [provider for provider, reason in reasons.items() if reason is None]


def _check_all(
    kinds: Mapping[tuple[Op, int], Case],
    present: Mapping[Op, list[Provider]],
    bench: KernelBench,
    left_out: list[LeftOut],
    advance_one: Callable[[str], None],
) -> dict[tuple[Op, int], list[Provider]]:
    """Gives the providers that compute the right thing, for each kind of case."""
    right: dict[tuple[Op, int], list[Provider]] = {kind: [] for kind in kinds}
    for (op, width), case in kinds.items():
        for provider in present[op]:
            reason = _why_not(case, provider, bench)
            if reason is None:
                right[op, width].append(provider)
            else:
                left_out.append(LeftOut(f"{provider} of {op}, C={width}", reason))
            advance_one(f"{provider} on {op}, C={width}")
    return right


def _why_not(case: Case, provider: Provider, bench: KernelBench) -> str | None:
    """Why a provider is not timed, or None if it computes the right thing.

    Raises:
        UserError: it was asked for by name, or it is alignlab's and wrong.
    """
    try:
        check(case, provider, bench.device)
        return None
    except WrongResult as error:
        if bench.providers or provider in PROVIDERS:
            raise UserError(f"{error}; no speed is reported") from None
        return str(error)
    except ValueError as error:
        reason = str(error)
    except FOREIGN as error:
        if provider in PROVIDERS:
            raise
        reason = raised(error)
    if bench.providers:
        raise UserError(f"--impl {provider}: {reason}") from None
    return reason


def facts_of(device: torch.device) -> dict[str, str]:
    """Device, time, versions and commit of rows that are measured now."""
    return {
        "gpu_name": _device_name(device),
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "alignlab_version": alignlab.__version__,
        "torch_version": torch.__version__,
        "triton_version": package_version("triton") or "not installed",
        "commit": git_commit() or "not a git checkout",
    }


def _write(new: list[Row], facts: Mapping[str, str], out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    table = out / CSV_NAME
    rows = replace_rows(read_rows(table), new)
    write_text(table, to_csv(rows))
    alike = {fact: value for fact, value in facts.items() if fact != "timestamp"}
    return [table, *draw_plots([row for row in rows if alike.items() <= row.items()], out)]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"
