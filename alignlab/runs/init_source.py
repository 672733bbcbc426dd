"""The checkpoint that `model.init_from` names."""

import os
from pathlib import Path
from typing import NamedTuple

from alignlab.config.path_kinds import not_a_run
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.runs.checkpoint_folders import (
    SHARDS,
    has_weights_name,
    no_checkpoint,
    step_folders,
)
from alignlab.runs.run_folder import RunFolder

SETTING = "model.init_from"
# What a run reads that starts from it. The average of the weights and the optimizer are not.
FILES = (
    "objectives.safetensors",
    "pytorch_lora_weights.safetensors",
    "transformer/*",
    f"transformer{SHARDS}/*",
)


class InitSource(NamedTuple):
    """Where a run's first weights come from: a run, and a checkpoint or copy of weights."""

    run: RunFolder
    checkpoint: Path

    def files(self) -> dict[str, Path]:
        """The files that are read, by their names in the checkpoint."""
        found = sorted(path for pattern in FILES for path in self.checkpoint.glob(pattern))
        return {path.relative_to(self.checkpoint).as_posix(): path for path in found}


def named_run(named: str) -> RunFolder:
    """The run that a setting names by its folder or by weights in it; it may be missing."""
    path = user_path(named)
    if not has_weights_name(path.name):
        return RunFolder(path)
    # from inside `checkpoints` its name alone is a path, too
    whole = path if len(path.parts) > 2 and ".." not in path.parts else Path(os.path.abspath(path))
    return RunFolder(whole.parents[1])


def init_source(config: RunConfig) -> InitSource | None:
    """What `model.init_from` names; None if the recipe does not say it.

    A run folder stands for the last step of a finished run. A copy of weights
    (`checkpoint.weights_every`) is as good as a checkpoint: nothing else is read.

    Raises:
        UserError: there is no such run or checkpoint, the run is not finished, or it is this one.
    """
    named = config.model.init_from
    if named is None:
        return None
    path, folder = user_path(named), named_run(named)
    is_checkpoint = has_weights_name(path.name)
    if not folder.recipe.is_file() or (is_checkpoint and not path.is_dir()):
        what = "checkpoint of a run" if is_checkpoint else "run folder (it has no recipe.yaml)"
        known = None if is_checkpoint else not_a_run(path)
        problem = known or f"{named}: no {what}; name a run folder or a checkpoint"
        raise UserError(f"{SETTING}: {problem}")
    if folder.path.resolve() == (user_path(config.output) / config.name).resolve():
        raise UserError(f"{SETTING}: {named} is this run itself: choose another name")
    if is_checkpoint:
        return InitSource(folder, path)
    if not folder.result.exists():
        raise UserError(
            f"{SETTING}: {named} is not finished, so its newest checkpoint is not its last: finish "
            "it, or name a checkpoint in it"
        )
    checkpoints = step_folders(folder.checkpoints)
    if not checkpoints:
        raise UserError(f"{SETTING}: {no_checkpoint(folder.checkpoints)}")
    return InitSource(folder, checkpoints[-1])
