"""A comparison: every variant with every seed on the same harness, then one report.

Variants of a seed share initial weights, clips, noise and noise levels, because all of these are
functions of the seed (`alignlab.randomness`). A finished run is reused, a killed one is resumed.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from alignlab import interruption
from alignlab.config.parts import EvalConfig
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.distributed.launch_env import refuse_several_ranks
from alignlab.environment import CHANGE_BITS, command_line, describe_environment, read_environment
from alignlab.errors import UserError
from alignlab.evaluation.blocks import means_of_lacking, metrics_of_blocks
from alignlab.experiments.compare.budget import decide_budget, with_budget
from alignlab.experiments.compare.config import CompareConfig, dump_compare
from alignlab.experiments.compare.cost import cost_of
from alignlab.experiments.compare.fairness import check_fair, differences, tuning_facts
from alignlab.experiments.compare.measured import check_expectations
from alignlab.experiments.compare.outputs import only_one, write_outputs
from alignlab.experiments.compare.own_metrics import measured_alike, packages_of
from alignlab.experiments.compare.result import (
    Budget,
    Comparison,
    Cost,
    Curve,
    RunResult,
    SampleClip,
)
from alignlab.experiments.compare.reuse import (
    measure_missing_blocks,
    open_run,
    refuse_different_plans,
)
from alignlab.experiments.compare.search_facts import search_facts
from alignlab.experiments.compare.sources import check_sources, refuse_prolonged_sources
from alignlab.experiments.compare.tracking import tracked
from alignlab.experiments.compare.variants import baseline_notice
from alignlab.experiments.launchers import Launcher, RunKey, make_launcher
from alignlab.experiments.launchers.config import check_batch
from alignlab.experiments.launchers.local import of_run, shown, threads, train_one
from alignlab.experiments.launchers.local_workers import LOOK_EVERY_S
from alignlab.experiments.launchers.several_ranks import recipe_to_train
from alignlab.experiments.launchers.sources import check_folders, waits
from alignlab.experiments.report.text import print_summary
from alignlab.runs.checksums import DamagedError, forget_checksums, read_json, write_json
from alignlab.runs.file_lock import HeldError
from alignlab.runs.input_record import InputRecord, fix_inputs, refuse_different_inputs
from alignlab.runs.inputs import Input, read_inputs
from alignlab.runs.kept_checkpoints import drop_if_unread
from alignlab.runs.metric_rows import evaluations, read_rows
from alignlab.runs.out_paths import make_output_folder
from alignlab.runs.run_folder import RunFolder
from alignlab.stage1.compatibility import is_finished
from alignlab.training.aligned_samples import check_recipe
from alignlab.training.build_optimizer import check_optimizer_package
from alignlab.training.setup import Caches

log = logging.getLogger(__name__)

CURVES = ("loss/", "sim/", "grad/", "diag/")


def compare(config: CompareConfig, *, launcher: Launcher | None = None) -> Path:
    """Trains what is not trained yet, prints the summary table, returns the report's path.

    Args:
        config: the recipe.
        launcher: trains the runs; None: one after another in this process.

    Raises:
        UserError: a run cannot be trained, variants are measured differently, or the folder holds
            a comparison of another recipe.
    """
    plan = prepare(config)
    folder = plan.folder
    with only_one(folder):
        forget_checksums(folder)
    with tracked(folder, plan.runs, plan.folders):
        _train_missing(plan, launcher or make_launcher("local", config.launch))
        measure_missing_blocks(plan.runs, plan.folders, plan.blocks)
        for key, run in plan.runs.items():
            drop_if_unread(plan.folders[key], run)
        cost = cost_of(config, folder)
        comparison = _comparison(plan, cost)
        report = write_outputs(comparison, folder)
    print_summary(comparison, Console())
    return report


def join(config: CompareConfig) -> None:
    """Trains runs that no other process trains, until all runs are finished; writes no report.

    A run that another process holds is waited for, and taken over if that process dies.

    Raises:
        UserError: as `compare`.
    """
    plan = prepare(config)
    check_folders(_missing(plan))
    caches: dict[str, Caches] = {}
    with threads(config.launch.cpus):
        while missing := _missing(plan):
            has_trained = False
            for key, run in missing.items():
                interruption.check()
                if waits(key, plan.runs, missing):
                    continue
                try:
                    with interruption.telling(partial(of_run, key)):
                        train_one(run, caches, config.launch, wait=False)
                except HeldError:
                    continue
                has_trained = True
                log.info("%s is finished", shown(key))
            if not has_trained:
                time.sleep(LOOK_EVERY_S)


def unfinished(config: CompareConfig) -> list[Path]:
    """Recipes of the runs that are not finished, each for an `alignlab train` of its own.

    The folders of all runs are made; what is there stays until a run is trained. Once all are
    trained, `compare` takes them as they are.

    Raises:
        UserError: as `compare`.
    """
    plan = prepare(config)
    return [recipe_to_train(run, plan.folders[key]) for key, run in _missing(plan).items()]


def check(config: CompareConfig) -> None:
    """Refuses what could not be compared, before anything is made; see `prepare`.

    Raises:
        UserError: as `prepare`, by the recipe alone.
    """
    refuse_several_ranks()
    check_fair(config)
    check_expectations(config, {v: probed(config, v, config.seeds[0]) for v in config.variants})
    # before folders are made and the budget measured; neither seed nor number of steps matters
    for run in config.runs.values():
        check_recipe(run)
        check_batch(run, config.launch)
        check_optimizer_package(run.optim)
    check_sources(_planned(config))


@dataclass(frozen=True)
class Plan:
    """What a comparison trains, and where.

    Args:
        folder: of the comparison.
        config: with the steps that the budget gives each variant.
        budget: what was decided, if the budget is not in steps.
        runs: every variant with every seed, as they are trained, and the baseline's second
            training.
        folders: theirs; they exist.
        blocks: those of each run that the report is about.
    """

    folder: Path
    config: CompareConfig
    budget: Budget | None
    runs: dict[RunKey, RunConfig]
    folders: dict[RunKey, RunFolder]
    blocks: dict[RunKey, tuple[int, ...]]


def prepare(config: CompareConfig) -> Plan:
    """Makes the folders of all runs.

    Raises:
        UserError: variants are measured differently, or runs by other versions of a package's
            metric; a finding expects what is not measured, a folder holds a run of another recipe,
            an objective never has anything to align, runs read other files than those that have
            begun, a run cannot start from what its `model.init_from` names, or the recipe is for
            `alignlab tune`.
    """
    if config.tune is not None:
        raise UserError(
            "tune: the recipe tunes its variants first: use `alignlab tune`, or compare them as "
            "they stand with tune=null"
        )
    check(config)
    notice = baseline_notice(config.baseline, config.runs[config.baseline])
    if notice is not None:
        log.warning("%s", notice)
    folder = make_output_folder(user_path(config.output), config.name)
    budget = decide_budget(config, folder)
    config = with_budget(config, budget)
    planned = _planned(config)
    refuse_prolonged_sources(planned)
    opened = {key: open_run(run) for key, run in planned.items()}
    runs = {key: run for key, (run, _) in opened.items()}
    folders = {key: run_folder for key, (_, run_folder) in opened.items()}
    refuse_different_plans(config, runs, folders)
    _fix_inputs(config, runs, folders)
    measured_alike(_evaluations(runs, folders))
    blocks = {key: run.eval.blocks or () for key, run in planned.items()}
    return Plan(folder, config, budget, runs, folders, blocks)


def _planned(config: CompareConfig) -> dict[RunKey, RunConfig]:
    """Every run, in the order in which they are trained."""
    return {
        (name, seed): probed(config, name, seed) for seed in config.seeds for name in config.trained
    }


def _fix_inputs(
    config: CompareConfig,
    runs: Mapping[RunKey, RunConfig],
    folders: Mapping[RunKey, RunFolder],
) -> None:
    """Refuses inputs that are others than those of the runs that have begun, or of their sweeps.

    A run that begins later is held to the inputs of today: it will not train with others.
    """
    inputs: dict[str, list[Input]] = {}
    for key, run in runs.items():
        variant = config.trained_as(key[0])
        if variant not in inputs:  # the seed names no file
            inputs[variant] = read_inputs(run, fetch=False)
        fix_inputs(folders[key], run, inputs[variant])
    for variant, tuning in config.tuned.items():
        sweep_folder = user_path(tuning.sweep).parent
        InputRecord(sweep_folder, config.output).refuse_changes(
            inputs[variant], since=f"variant {variant} was tuned", remedy="tune it again"
        )
    unknown = [f for f, record in _records(runs, folders) if f.has_begun and not record.exists]
    if unknown:
        log.warning(
            "%d of %d runs began before inputs were recorded, such as %s: whether they read the "
            "same files as the others is not known",
            *(len(unknown), len(runs), unknown[0].path),
        )
    # also those that are not on this machine, where the runs have seen them
    refuse_different_inputs(record for _, record in _records(runs, folders))


def _records(
    runs: Mapping[RunKey, RunConfig], folders: Mapping[RunKey, RunFolder]
) -> list[tuple[RunFolder, InputRecord]]:
    return [(folders[key], InputRecord(folders[key].path, run.output)) for key, run in runs.items()]


def _evaluations(
    runs: Mapping[RunKey, RunConfig], folders: Mapping[RunKey, RunFolder]
) -> list[tuple[RunFolder, EvalConfig]]:
    return [(folders[key], run.eval) for key, run in runs.items()]


def _comparison(plan: Plan, cost: Cost | None) -> Comparison:
    config, folder, folders = plan.config, plan.folder, plan.folders
    refuse_different_inputs(record for _, record in _records(plan.runs, folders))
    results = {
        key: collect(run_folder, *key, folder, plan.blocks[key])
        for key, run_folder in folders.items()
    }
    own_metrics = measured_alike(_evaluations(plan.runs, folders))
    environment = describe_environment() | trained_on(folders) | packages_of(own_metrics)
    return Comparison(
        name=config.name,
        baseline=config.baseline,
        seeds=config.seeds,
        variants=tuple(config.variants),
        recipe=dump_compare(config),
        differing=differences(config),
        environment=dict(environment),
        duration_s=_seconds_so_far(folder),
        command=command_line("alignlab"),
        commit=environment["commit"],
        results=tuple(run for (name, _), run in results.items() if name in config.variants),
        allowed=config.allow_differences,
        cost=cost,
        budget=plan.budget,
        tuning=tuning_facts(config) | search_facts(config),
        again=tuple(run for (name, _), run in results.items() if name not in config.variants),
        finding=config.finding,
        own_metrics=own_metrics,
    )


def _missing(plan: Plan) -> dict[RunKey, RunConfig]:
    """The runs that are not finished."""
    return {key: run for key, run in plan.runs.items() if not is_finished(run, plan.folders[key])}


def _train_missing(plan: Plan, launch: Launcher) -> None:
    runs = plan.runs
    missing = _missing(plan)
    if len(missing) < len(runs):
        log.info("%d of %d runs are finished already", len(runs) - len(missing), len(runs))
    begin = time.monotonic()
    earlier = _seconds_so_far(plan.folder)

    ended = [shown(key) for key in runs if key not in missing]

    def finished(key: RunKey) -> None:
        ended.append(shown(key))
        seconds = earlier + time.monotonic() - begin
        with only_one(plan.folder):
            forget_checksums(plan.folder)  # of a process that had less to wait for
            write_json(plan.folder / "progress.json", {"seconds": seconds}, shared=True)

    def how_far() -> str:
        names = f" ({'; '.join(ended)})" if ended else ""
        return f"with {len(ended)} of {len(runs)} runs finished{names}"

    if missing:
        with interruption.telling(how_far):
            launch(missing, finished)


def probed(config: CompareConfig, variant: str, seed: int) -> RunConfig:
    """The run of a variant, or of `again`, evaluated on every block that any variant aligns.

    Without this, `none` taps nothing and there would be nothing to compare the others with.
    """
    run = config.run(variant, seed)
    if run.eval.blocks is not None:
        return run
    blocks = {
        block
        for other in config.runs.values()
        for objective in other.objectives.values()
        for block in objective.tapped_blocks
    }
    evaluation = run.eval.model_copy(update={"blocks": tuple(sorted(blocks))})
    return run.model_copy(update={"eval": evaluation})


def collect(
    run: RunFolder,
    variant: str,
    seed: int,
    folder: Path,
    blocks: tuple[int, ...] | None = None,
) -> RunResult:
    """What a finished run left in its folder.

    Args:
        run: its folder.
        variant: its name.
        seed: of the run.
        folder: of the comparison.
        blocks: those whose metrics are taken; None: all that were measured.
    """
    result = run.read_result()
    if result is None:
        raise UserError(f"{run.path}: the run is not finished")
    curves: dict[str, list[tuple[int, float]]] = {}
    rows = read_rows(run.metrics)
    for row in rows:
        for key, value in row.items():
            if key.startswith(CURVES):
                curves.setdefault(key, []).append((int(row["step"]), value))
    metrics, earlier = result["metrics"], evaluations(rows)
    if blocks is not None:
        metrics = metrics_of_blocks(metrics, blocks)
        earlier = {step: metrics_of_blocks(found, blocks) for step, found in earlier.items()}
    return RunResult(
        variant=variant,
        seed=seed,
        steps=result["steps"],
        run_dir=str(run.path.relative_to(folder)),
        metrics=metrics,
        curves={key: tuple(points) for key, points in curves.items()},
        samples=tuple(_clip(clip) for clip in run.sample_list()),
        notes=tuple(result.get("notes", ())),
        aligned={alias: (count[0], count[1]) for alias, count in result.get("aligned", {}).items()},
        diverged=result.get("diverged", False),
        measured=_by_step(earlier, result["steps"], metrics),
    )


def _by_step(
    earlier: Mapping[int, Mapping[str, float]], last: int, metrics: Mapping[str, float]
) -> dict[str, Curve]:
    """What was measured before the last step, with the numbers of the last, by name.

    The mean over blocks is left out at steps where one of its blocks was not measured: it would be
    of other blocks than the last.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, found in sorted(earlier.items()):
        partial = means_of_lacking(found, metrics)
        for name, value in found.items():
            if name not in partial:
                curves.setdefault(name, []).append((step, value))
    for name, points in curves.items():
        if name in metrics:
            points.append((last, metrics[name]))
    return {name: tuple(points) for name, points in curves.items()}


def trained_on(folders: Mapping[RunKey, RunFolder]) -> dict[str, str]:
    """What changes the last bits of the runs; several of a kind are logged."""
    environments = [
        # older runs had one process and do not say so
        {"processes": "1"} | read_environment(folder.path / "environment.json")
        for folder in folders.values()
    ]
    facts = {
        name: sorted({environment.get(name, "not recorded") for environment in environments})
        for name in CHANGE_BITS
        if any(name in environment for environment in environments)
    }
    for name, values in facts.items():
        if len(values) > 1:
            log.warning("%s: runs were trained with %s", name, " and with ".join(values))
    return {name: ", ".join(values) for name, values in facts.items()}


def _clip(clip: dict[str, Any]) -> SampleClip:
    """An entry of a run's `samples.json`, its files relative to the run's folder."""
    return SampleClip(
        key=clip["key"],
        caption=clip["caption"],
        video=f"samples/{clip['video']}",
        real=f"samples/{clip['real']}",
        references=tuple(f"samples/{name}" for name in clip["references"]),
    )


def _seconds_so_far(folder: Path) -> float:
    """Training time before a killed comparison was resumed."""
    progress = folder / "progress.json"
    if not progress.exists():
        return 0.0
    fix = "remove it; the comparison's duration then counts from this start"
    seconds = read_json(progress, fix=fix).get("seconds")
    if not isinstance(seconds, int | float):
        raise DamagedError(progress, "it holds no seconds", fix)
    return float(seconds)
