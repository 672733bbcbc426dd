"""A checkpoint of a run, evaluated as the run itself is at its end."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignlab.config.identity import identity, settings_hash
from alignlab.config.parts import EvalConfig
from alignlab.config.run import RunConfig
from alignlab.environment import describe_environment
from alignlab.errors import UserError
from alignlab.evaluation.evaluate import measure
from alignlab.evaluation.generation import num_measured_clips
from alignlab.evaluation.run_warnings import nonfinite_warnings, sample_warnings
from alignlab.recipe import load_run, validated
from alignlab.runs.checkpoint_folders import step_of
from alignlab.runs.checksums import write_json
from alignlab.runs.input_record import tell_changes
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.out_paths import out_file
from alignlab.runs.run_folder import RunFolder, in_its_output
from alignlab.training.checkpoint import NEWEST, ModelChoice, restore_weights
from alignlab.training.setup import Caches, build_run, try_own_metrics, warn_of_few_clips
from alignlab.training.texts_ahead import encode_measured_texts

SCHEDULE = ("every", "sample_every")  # settings of `eval` that say when a run evaluates itself


@dataclass(frozen=True)
class RunEvaluation:
    """What `evaluate_run` found.

    Args:
        step: of the checkpoint.
        ema: whether the moving average of the weights was evaluated.
        eval: how it was measured.
        metrics: by name, as in `result.json`, without what training costs.
        notes: warnings, as in `result.json`.
        own_metrics: what `result.json` says of metrics of other packages.
    """

    step: int
    ema: bool
    eval: EvalConfig
    metrics: dict[str, float]
    notes: tuple[str, ...]
    own_metrics: dict[str, Any] = field(default_factory=dict)


@quiet_libraries()
def evaluate_run(
    run_dir: Path,
    *,
    choice: ModelChoice = NEWEST,
    evaluation: EvalConfig | None = None,
    samples: Path | None = None,
    generation: bool = True,
    caches: Caches | None = None,
) -> RunEvaluation:
    """Measures a checkpoint with the clips, the noise and under the names of the run's own end.

    The run's folder is left as it is.

    Args:
        run_dir: a run folder.
        choice: which model of the run.
        evaluation: how it is measured; None: as the recipe says.
        samples: folder that generated clips are written to; None: none is written.
        generation: generate clips and measure them.
        caches: encoded clips of other runs on the same data.

    Raises:
        UserError: no such run or checkpoint, the recipe cannot be evaluated so, or there is no
            moving average to evaluate.
    """
    folder = RunFolder.open(run_dir)
    folder.check_split_rule()
    config = folder.config()
    if evaluation is not None:
        settings = config.model_dump(mode="json") | {"eval": evaluation.model_dump(mode="json")}
        config = validated(RunConfig, settings, stored=True)
    is_average, _ = choice.is_average(config.optim), choice.find(folder.checkpoints)
    tell_changes(folder, config)
    run = build_run(in_its_output(folder, config), caches)
    warn_of_few_clips(run)
    if generation:
        try_own_metrics(run)
    encode_measured_texts(run, generation=generation)
    with choice.reading(folder.checkpoints) as found:
        restore_weights(run.state, found)
    if not is_average:
        run.state.ema = None
    metrics = measure(run, samples, generation=generation)
    notes = [*run.notes, *sample_warnings(metrics, num_measured_clips(run))]
    notes += nonfinite_warnings(metrics)
    own = run.own_metrics() if generation else {}
    return RunEvaluation(run.state.step, is_average, config.eval, metrics, tuple(notes), own)


def evaluate_to_file(
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    choice: ModelChoice = NEWEST,
    out: Path | None = None,
) -> tuple[RunEvaluation, Path]:
    """Evaluates a checkpoint, and writes the numbers as JSON and the clips into a folder beside it.

    Args:
        run_dir: a run folder.
        overrides: `eval.key=value` strings over its recipe.
        choice: which model of the run.
        out: the JSON file; None: `evaluations/step-<step>.json` in the run's folder, with a hash
            of the settings at the end of its name where they are not the run's own.

    Returns:
        What was found, and the file.

    Raises:
        UserError: as `evaluate_run`, or an override is of anything but how a run is measured.
    """
    for override in overrides:
        _check_override(override)
    folder = RunFolder.open(run_dir)
    own = folder.config()
    unscheduled = [f"eval.{key}=null" for key in SCHEDULE]
    config = load_run(folder.recipe, [*unscheduled, *overrides], stored=True)
    asked = config.eval
    if asked.blocks and asked.blocks != own.eval.blocks and config.measured_against is None:
        raise UserError(
            "eval.blocks: tokens are measured against a teacher, and the recipe of "
            f"{run_dir} names none: leave eval.blocks out"
        )
    with choice.reading(folder.checkpoints) as found:
        # the same one, though a run that trains has a newer one meanwhile
        choice = replace(choice, step=step_of(found))
        is_default = out is None
        if out is None:
            name = f"step-{step_of(found):06d}{_mark(own, asked, choice)}.json"
            out = folder.path / "evaluations" / name
        with out_file(out, ".json", is_default=is_default):
            samples = out.with_name(f"{out.stem}-samples")
            result = evaluate_run(run_dir, choice=choice, evaluation=asked, samples=samples)
            content = {
                "step": result.step,
                "ema": result.ema,
                "eval": result.eval.model_dump(mode="json", exclude=set(SCHEDULE)),
                "metrics": result.metrics,
                "notes": result.notes,
                "environment": describe_environment(),
                **result.own_metrics,
            }
            write_json(out, content)
    return result, out


def _check_override(override: str) -> None:
    section, _, key = override.partition("=")[0].partition(".")
    if section != "eval" or key in SCHEDULE:
        raise UserError(
            f"{override}: an evaluation takes settings of how a run is measured, such as "
            "eval.clips=64"
        )


def _mark(own: RunConfig, asked: EvalConfig, choice: ModelChoice) -> str:
    """What the name of a file says of an evaluation that is not the run's own."""
    exclude = dict.fromkeys(SCHEDULE, True)
    mark = ""
    if identity(asked, exclude) != identity(own.eval, exclude):
        mark += f"-{settings_hash(asked, exclude)}"
    if own.optim.ema is not None and not choice.is_average(own.optim):
        mark += "-no-ema"
    return mark
