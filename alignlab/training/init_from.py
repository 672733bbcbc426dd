"""The first weights of a run that starts from another run's (`model.init_from`).

The transformer has the last weights of that checkpoint, not their moving average. Objectives of the
same alias, kind and shape go on with their projectors. The optimizer, the moving average and
schedules begin anew, at step 0.
"""

import logging
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from alignlab.config.model import ModelConfig
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.models.wan import Wan
from alignlab.runs.checkpoint_folders import OPTIMIZER_STATE, hold, problem
from alignlab.runs.init_source import SETTING, InitSource, init_source
from alignlab.training import checkpoint
from alignlab.training.checkpoint import AVERAGE, RunState, shards_of

log = logging.getLogger(__name__)


def checked_source(config: RunConfig, locks: ExitStack) -> InitSource | None:
    """What `model.init_from` names, if its weights fit; None if the recipe does not say it.

    Args:
        config: the recipe.
        locks: as long as it is open the source, which may be training, keeps that checkpoint.

    Raises:
        UserError: as `init_source`, and when the checkpoint is damaged, one of the two trains a
            LoRA and the other all weights, or their LoRAs differ.
    """
    source = init_source(config)
    if source is None:
        return None
    there = source.run.config()
    if not locks.enter_context(hold(source.checkpoint)):
        raise UserError(f"{SETTING}: {source.checkpoint} is gone: name another")
    broken = problem(source.checkpoint, leave_out=(*OPTIMIZER_STATE, AVERAGE, shards_of(AVERAGE)))
    if broken:
        raise UserError(f"{SETTING}: {source.checkpoint} is damaged ({broken}): name another")
    check_fits(config, there, source.run.path)
    if config.model.lora is not None and there.model.path != config.model.path:
        log.warning(
            "%s: the LoRA of %s was trained on %s, this run puts it on %s",
            *(SETTING, source.run.path, there.model.path, config.model.path),
        )
    return source


def check_fits(config: RunConfig, there: RunConfig, run: Path) -> None:
    """Refuses weights of another kind than those that a run trains.

    Args:
        config: its recipe.
        there: that of the run that it starts from.
        run: the folder of that one.

    Raises:
        UserError: one of the two trains a LoRA and the other all weights, their LoRAs differ, or
            they train different experts.
    """
    if there.model.expert != config.model.expert:
        raise UserError(
            f"{SETTING}: {run} has model.expert {there.model.expert}, this run "
            f"{config.model.expert}: they must be equal"
        )
    if there.model.train != config.model.train:
        whole = "export the run"
        if there.model.train == "lora":
            whole += (
                ", fuse the adapter into its model (diffusers: load_lora_weights, fuse_lora, "
                "unload_lora_weights, save_pretrained)"
            )
        raise UserError(
            f"{SETTING}: {run} trained {_shown(there.model)}, this run trains "
            f"{_shown(config.model)}: a LoRA is no whole model, nor is a model one; "
            f"set model.train={there.model.train}, or {whole} and name the folder as model.path"
        )
    if there.model.lora != config.model.lora:
        raise UserError(
            f"{SETTING}: {run} has model.lora {there.model.lora}, this run "
            f"{config.model.lora}: they must be equal"
        )


def start_from(state: RunState, wan: Wan, config: RunConfig, source: InitSource) -> None:
    """Puts the weights of a source into a run's fresh state.

    What of the objectives could not be taken over is logged, and noted for the result.

    Raises:
        UserError: the transformer is of another shape.
    """
    try:
        checkpoint.load_transformer(wan.transformer, source.checkpoint)
    except RuntimeError as error:  # torch's of other shapes
        raise UserError(
            f"{SETTING}: {source.checkpoint} does not fit the transformer of {config.model.path}: "
            "it is of another shape; take the model that the run began with"
        ) from error
    _take_projectors(state, config, source)
    parameters = dict(wan.transformer.named_parameters())
    for averages in (state.ema, state.self_teacher):
        for name, average in (averages or {}).items():
            average.copy_(parameters[name].detach())
    log.info("%s: starts from %s", SETTING, source.checkpoint)


@torch.no_grad()
def _take_projectors(state: RunState, config: RunConfig, source: InitSource) -> None:
    there = source.run.config()
    tensors = load_file(source.checkpoint / "objectives.safetensors")
    here = state.objectives.state_dict()
    trained = {name for name, p in state.objectives.named_parameters() if p.requires_grad}
    anew = []
    for alias, objective in config.objectives.items():
        prefix = f"objective_{alias}."
        own = {name: here[name] for name in trained if name.startswith(prefix)}
        theirs = {name: t for name, t in tensors.items() if name.startswith(prefix)}
        other = there.objectives.get(alias)
        if other is None:
            reason = "not among its objectives"
        elif other.name != objective.name:
            reason = f"it is {other.name} there"
        elif _shapes(own) != _shapes(theirs):
            reason = "of another shape there"
        else:
            for name, value in own.items():
                value.copy_(theirs[name])
            continue
        if own:
            anew.append(f"{alias} ({reason})")
    left = [alias for alias in there.objectives if alias not in config.objectives]
    told = [f"projectors that begin anew: {', '.join(anew)}"] if anew else []
    if left:
        told.append(f"objectives of {source.run.path} that are not continued: {', '.join(left)}")
    for text in told:
        log.warning("%s: %s", SETTING, text)
    state.notes = (*state.notes, *(f"{SETTING}: {text}" for text in told))


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _shown(model: ModelConfig) -> str:
    return "a LoRA" if model.train == "lora" else "all weights"
