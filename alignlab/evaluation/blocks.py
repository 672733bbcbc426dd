"""Metrics of other blocks than those that a run was measured on when it was finished."""

import re
from collections.abc import Collection, Mapping

import torch

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.evaluation.collectors import with_means
from alignlab.evaluation.evaluate import block_metrics, evaluated_model, teacher_of
from alignlab.runs.checkpoint_folders import step_folders, step_path
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.run_folder import RunFolder
from alignlab.training.checkpoint import ModelChoice, restore_weights
from alignlab.training.setup import Caches, build_run
from alignlab.training.texts_ahead import encode_measured_texts

_OF_BLOCK = re.compile(r"(?P<name>.+)/block(?P<block>\d+)")


@quiet_libraries()
@torch.no_grad()
def measure_blocks(folder: RunFolder, config: RunConfig, caches: Caches | None = None) -> None:
    """Measures a finished run on the blocks of `config`, and makes that its recipe.

    The result has what it had, and these blocks. The log of the training stays as it is.

    Args:
        folder: of the run; this process holds its lock.
        config: its recipe but for `eval.blocks`, which is not None.
        caches: encoded clips of earlier runs.

    Raises:
        UserError: there is no checkpoint of its last step, or it is damaged.
    """
    result, blocks = folder.read_result(), config.eval.blocks
    assert result is not None and blocks is not None
    newest = step_path(folder.checkpoints, config.steps)
    if newest not in step_folders(folder.checkpoints):
        raise UserError(
            f"{folder.path} was measured on other blocks than {', '.join(map(str, blocks))}, and "
            "the checkpoint of its last step is gone: set eval.blocks to those that it has, or "
            "remove the folder to train it again"
        )
    with ModelChoice(step=config.steps).reading(folder.checkpoints) as whole:
        run = build_run(config, caches)
        restore_weights(run.state, whole)
    encode_measured_texts(run, generation=False)
    clips = [run.val_clips[i] for i in range(min(config.eval.clips, len(run.val_clips)))]
    alias = config.measured_against
    assert alias is not None
    teacher = teacher_of(run, alias)
    with evaluated_model(run, blocks) as branch:
        measured = block_metrics(run, branch, clips, teacher)
    result["metrics"] = _placed(result["metrics"], measured)
    folder.write_result(result)
    folder.write_recipe(config)  # last: a kill before is made up for


def metrics_of_blocks(metrics: Mapping[str, float], blocks: Collection[int]) -> dict[str, float]:
    """Of the metrics of a run those that a run measured on fewer blocks would have.

    Args:
        metrics: by name.
        blocks: whose metrics are kept, and averaged in `<name>/mean`.
    """
    kept: dict[str, float] = {}
    dropped: set[str] = set()
    for key, value in metrics.items():
        match = _OF_BLOCK.fullmatch(key)
        if match is None or int(match["block"]) in blocks:
            kept[key] = value
        else:
            dropped.add(match["name"])
    means = with_means({k: v for k, v in kept.items() if k.rpartition("/block")[0] in dropped})
    return {
        key: means.get(key, value)
        for key, value in kept.items()
        if key in means or key.removesuffix("/mean") not in dropped
    }


def means_of_lacking(found: Mapping[str, float], whole: Mapping[str, float]) -> set[str]:
    """Names `<name>/mean` of which `found` lacks a block that `whole` has.

    Args:
        found: metrics by name.
        whole: those that they are held against.
    """
    lacking = (_OF_BLOCK.fullmatch(key) for key in whole.keys() - found.keys())
    return {f"{match['name']}/mean" for match in lacking if match is not None}


def _placed(before: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """The metrics with those of all blocks in the place of those of some, in their usual order."""
    others = {key: value for key, value in before.items() if key not in measured}
    first = [key for key in others if key.startswith("val/")]
    return {
        **{key: others[key] for key in first},
        **measured,
        **{key: value for key, value in others.items() if key not in first},
    }
