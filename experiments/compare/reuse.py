"""What a comparison makes of runs that are there already: from before it got a variant, or steps.

A variant that aligns another block changes `eval.blocks` of all runs, and no trained number. The
runs that are there keep their folders: finished ones are measured on the blocks that they lack,
from their last checkpoint, and those of variants that are gone are left out where they are read.
"""

import logging
from collections.abc import Mapping

from alignlab.config.identity import identity
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.evaluation.blocks import measure_blocks
from alignlab.experiments.compare.config import CompareConfig
from alignlab.experiments.launchers import RunKey
from alignlab.recipe import NUMBERLESS
from alignlab.runs.prolong import Leg, expected_plan, planned_by_steps
from alignlab.runs.run_folder import RunFolder, only_writer
from alignlab.training.setup import Caches, shared_caches

log = logging.getLogger(__name__)

Runs = Mapping[RunKey, RunConfig]
Folders = Mapping[RunKey, RunFolder]


def open_run(run: RunConfig) -> tuple[RunConfig, RunFolder]:
    """Makes or opens the folder of a run; gives its recipe, with the blocks that it is measured on.

    These are other blocks than the comparison's in a run that was there before.

    Raises:
        UserError: as `RunFolder.create`, or the run is not finished, has to be measured on more
            blocks, and another process trains it.
    """
    folder = RunFolder(user_path(run.output) / run.name)
    stored = _stored_blocks(folder)
    if stored is not None and folder.has_begun:  # blocks are no reason to refuse it
        folder.check_goes_on(_with_blocks(run, stored))
    held = _held_blocks(folder, run)
    if held is not None:
        if folder.result.exists() or set(held) >= set(run.eval.blocks or ()):
            run = _with_blocks(run, held)
        else:  # evaluations before the last step (`eval.every`) may lack some of them
            with only_writer(folder.path, wait=False):
                more = sorted({*held, *(run.eval.blocks or ())})
                folder.write_recipe(_with_blocks(folder.config(), tuple(more)))
            run = _with_blocks(run, tuple(more))
    return run, RunFolder.create(run)


def measure_missing_blocks(
    runs: Runs, folders: Folders, blocks: Mapping[RunKey, tuple[int, ...]]
) -> None:
    """Measures finished runs on the blocks that the comparison has now and they have not.

    Args:
        runs: as they were trained.
        folders: theirs.
        blocks: that the comparison is about, of each run.

    Raises:
        UserError: the checkpoint of such a run is gone, or another process writes there.
    """
    lacking = {
        key: {*blocks[key]} - {*(run.eval.blocks or ())}
        for key, run in runs.items()
        if run.measured_against is not None
    }
    lacking = {key: missing for key, missing in lacking.items() if missing}
    if not lacking:
        return
    added = sorted({block for missing in lacking.values() for block in missing})
    log.info(
        "%d of %d runs were measured without block %s: measuring it, from their last checkpoints",
        *(len(lacking), len(runs), ", ".join(map(str, added))),
    )
    caches: dict[str, Caches] = {}
    for key in lacking:
        run = runs[key]
        all_blocks = tuple(sorted({*blocks[key], *(run.eval.blocks or ())}))
        with only_writer(folders[key].path, wait=False):
            measure_blocks(folders[key], _with_blocks(run, all_blocks), shared_caches(run, caches))


def refuse_different_plans(config: CompareConfig, runs: Runs, folders: Folders) -> None:
    """Refuses runs whose schedules were planned otherwise, since only some were prolonged.

    Where variants have their number of steps in common, runs with the same are held against each
    other; with another budget, the seeds of a variant and of its second training.

    Args:
        config: the comparison.
        runs: all of it.
        folders: theirs.

    Raises:
        UserError: it names two of them.
    """
    first: dict[int | str, tuple[RunKey, tuple[Leg, ...]]] = {}
    for key, run in runs.items():
        if not planned_by_steps(run):
            continue
        legs = tuple(
            leg.model_copy(update={"begun": ""}) for leg in expected_plan(folders[key], run).legs
        )
        group = run.steps if config.budget == "steps" else config.trained_as(key[0])
        other, others = first.setdefault(group, (key, legs))
        if legs != others:
            one, two = folders[other].path, folders[key].path
            raise UserError(
                f"{one} and {two}: their schedules would not be the same "
                f"({_shown(others)}; {_shown(legs)}): finish all runs with the same steps before "
                "they are prolonged, or choose another name"
            )


def _held_blocks(folder: RunFolder, run: RunConfig) -> tuple[int, ...] | None:
    """The blocks of a folder's recipe, if `run` differs in them, and in `steps` at most."""
    blocks = _stored_blocks(folder)
    if blocks is None or run.eval.blocks is None or blocks == run.eval.blocks:
        return None
    alike = _with_blocks(folder.config(), run.eval.blocks).model_copy(update={"steps": run.steps})
    return blocks if identity(alike, NUMBERLESS) == identity(run, NUMBERLESS) else None


def _stored_blocks(folder: RunFolder) -> tuple[int, ...] | None:
    """The blocks of a folder's recipe, if it says them."""
    if not folder.recipe.is_file():
        return None
    try:
        return folder.config().eval.blocks
    except UserError:
        return None  # `RunFolder.create` says what it is


def _with_blocks(run: RunConfig, blocks: tuple[int, ...]) -> RunConfig:
    return run.model_copy(update={"eval": run.eval.model_copy(update={"blocks": blocks})})


def _shown(legs: tuple[Leg, ...]) -> str:
    """Such as `40 steps, stretch to 80 from step 40`."""
    first, *others = legs
    parts = [f"{leg.resume_schedule} to {leg.steps} from step {leg.from_step}" for leg in others]
    return ", ".join([f"{first.steps} steps", *parts])
