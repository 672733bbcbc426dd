"""Checkpoints: safetensors and JSON in a folder that is there whole or not at all.

checkpoints/step-000500/
    transformer/                         all weights (full fine-tuning), or
    pytorch_lora_weights.safetensors     the adapter, as diffusers' pipelines load it
    objectives.safetensors               projectors, state of plateau stops and measured weights
    transformer_shards/, ema_shards/     in place of `transformer/` and `ema.safetensors` where
                                         ranks share the transformer: a file of each
    optimizer.safetensors                AdamW's state, by parameter name, or
    optimizer/                           likewise, a file of each rank (`sharded_files.py`)
    ema.safetensors                      the moving average, if there is one
    self_teacher.safetensors             that which an objective has for a teacher, likewise
    state.json                           step, hash of frozen Stage 1 networks, how many samples
                                         had something to align
    checksums.json                       SHA-256 of all of these
    log.json                             what `metrics.jsonl` held

Stage 1 has `network.safetensors` in place of the first three.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab import interruption
from alignlab.config.optim import OptimConfig
from alignlab.distributed.sharding import copy_whole, has_shards, local_part, reduce_gradients
from alignlab.errors import UserError
from alignlab.models.model_files import load_pretrained
from alignlab.models.weight_check import check_weights
from alignlab.runs.checkpoint_folders import (
    OPTIMIZER,
    OPTIMIZER_SHARDS,
    SHARDS,
    STATE,
    WEIGHTS_ONLY,
    has_optimizer,
    no_checkpoint,
    readable_folders,
    reading,
    step_of,
)
from alignlab.runs.digest import frozen_digest
from alignlab.training.optimizer_step import StepByTensor
from alignlab.training.sharded_files import SEPARATOR, placed, read_into, read_shards

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_PREFIX = "transformer."
TRANSFORMER = "transformer"
AVERAGE = "ema.safetensors"
OBJECTIVES = "objectives.safetensors"
Weights = dict[str, dict[str, Tensor]]
"""Tensors by name, by the file that they are written to; those of the transformer by its name."""
EXTRA = ("aligned",)  # of `state.json`, see `TrainState.extra`
DAMAGED = "remove that step's folder: the run then resumes from the checkpoint before it"


@dataclass
class TrainState(ABC):
    """All that changes during a training, whatever it trains.

    Args:
        optimizer: over `names`.
        step: optimizer steps done.
        notes: what the result has to say of how it came about, such as a damaged checkpoint.
        extra: what else `state.json` keeps; only its owner reads it.

    `names` holds the trained parameters with the names that a checkpoint gives them.
    """

    optimizer: torch.optim.Optimizer
    step: int = field(default=0, kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    extra: dict[str, Any] = field(default_factory=dict, kw_only=True)
    names: dict[nn.Parameter, str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = {p: name for name, p in self.named_parameters() if p.requires_grad}

    @property
    def is_in_shards(self) -> bool:
        """Whether each rank holds a part of what is trained."""
        return False

    def before_backward(self, *, is_last: bool) -> None:
        """Called before each backward pass of a step, of which one is the last."""
        return

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by their name in a checkpoint."""

    @abstractmethod
    def weights(self) -> Weights:
        """Everything but the optimizer's state and the step: the tensors that training changes."""

    def write_weights(self, folder: Path, weights: Weights) -> None:
        """Writes what `weights` gave, then or copied, and reads nothing that training changes."""
        for file, tensors in weights.items():
            save_file(tensors, folder / file)

    @abstractmethod
    def read_weights(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Puts back what `write_weights` wrote; `facts` is what `state.json` says.

        Raises:
            UserError: the checkpoint does not belong to this training.
        """

    def facts(self) -> dict[str, Any]:
        """What `state.json` says."""
        notes = {"notes": list(self.notes)} if self.notes else {}
        return {"step": self.step, **self.extra, **notes}


@dataclass
class RunState(TrainState):
    """What a run trains.

    Args:
        transformer: the diffusers model itself, without wrappers.
        objectives: projectors of all objectives; may have no parameter.
        ema: moving average of the trained transformer parameters by name, or None.
        self_teacher: moving average of the same that an objective has for a teacher, or None.
        put_aside: the trained parameters while their average is in their place, else None.
    """

    transformer: WanTransformer3DModel
    objectives: nn.Module
    ema: dict[str, Tensor] | None
    self_teacher: dict[str, Tensor] | None = field(default=None, kw_only=True)
    put_aside: dict[str, Tensor] | None = field(default=None, kw_only=True)

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained instead of all weights."""
        return bool(getattr(self.transformer, "peft_config", None))

    @property
    def is_in_shards(self) -> bool:
        return has_shards(list(self.names))

    def before_backward(self, *, is_last: bool) -> None:
        reduce_gradients(self.transformer, is_last=is_last)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part, module in (("transformer", self.transformer), ("objectives", self.objectives)):
            for name, parameter in module.named_parameters():
                yield f"{part}.{name}", parameter

    def put_back(self) -> None:
        """Puts the trained parameters back in place of their average, if they were put aside."""
        if self.put_aside is None:
            return
        with interruption.held():
            copy_weights(self.put_aside, self.transformer)
            self.put_aside = None

    def weights(self) -> Weights:
        self.put_back()  # a signal may have come before `averaged_weights` could
        model = self.transformer
        own = get_peft_model_state_dict(model) if self.is_lora else model.state_dict()
        return {TRANSFORMER: own, OBJECTIVES: _trained(self.objectives), **self.averages()}

    def write_weights(self, folder: Path, weights: Weights) -> None:
        own = weights.get(TRANSFORMER)  # what is in shards, its ranks have written
        if own is not None and self.is_lora:
            save_lora(self.transformer, folder, own)
        elif own is not None:
            with torch.device("meta"):  # its own weights are not read
                plain = WanTransformer3DModel.from_config(self.transformer.config)
            plain.load_state_dict(own, assign=True)
            plain.save_pretrained(folder / TRANSFORMER)
        super().write_weights(folder, {k: v for k, v in weights.items() if k != TRANSFORMER})

    def read_weights(self, folder: Path, facts: Mapping[str, Any]) -> None:
        if facts["frozen"] != frozen_digest(self.objectives):
            raise UserError(
                f"{folder}: a Stage 1 network that the objectives read has changed since; "
                "bring it back, or start a new run under another name"
            )
        load_transformer(self.transformer, folder)
        _restore_trained(self.objectives, load_file(folder / OBJECTIVES))
        for file, average in self.averages().items():
            if (folder / shards_of(file)).is_dir():
                read_into(average, folder / shards_of(file))
                _check(folder / shards_of(file), average)
                continue
            stored = load_file(folder / file)
            _check(folder / file, stored)
            for name, value in stored.items():
                copy_whole(average[name], value)

    def averages(self) -> dict[str, dict[str, Tensor]]:
        """Moving averages by their file."""
        kept = {AVERAGE: self.ema, "self_teacher.safetensors": self.self_teacher}
        return {file: average for file, average in kept.items() if average is not None}

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"frozen": frozen_digest(self.objectives)}


@dataclass(frozen=True)
class ModelChoice:
    """Which model of a run is meant.

    Args:
        step: of the checkpoint; None: the newest.
        ema: the moving average of the weights, or the weights themselves; None: the average if
            the recipe keeps one, as a run evaluates itself.
    """

    step: int | None = None
    ema: bool | None = None

    def is_average(self, optim: OptimConfig) -> bool:
        """Whether it is the moving average.

        Raises:
            UserError: it is asked for, and the recipe keeps none.
        """
        if self.ema and optim.ema is None:
            raise UserError("--ema: the run keeps no moving average of its weights (optim.ema)")
        return optim.ema is not None if self.ema is None else self.ema

    def find(self, checkpoints: Path) -> Path:
        """The folder of the checkpoint.

        Raises:
            UserError: it is not there; the message names those that are.
        """
        folders = {step_of(folder): folder for folder in readable_folders(checkpoints)}
        if not folders:
            raise no_checkpoint(checkpoints)
        step = max(folders) if self.step is None else self.step
        if step not in folders:
            raise UserError(
                f"{checkpoints.parent}: no checkpoint of step {step}; "
                f"there are those of steps {', '.join(map(str, folders))}"
            )
        return folders[step]

    @contextmanager
    def reading(self, checkpoints: Path) -> Iterator[Path]:
        """The folder of the checkpoint, whose weights are whole; no training prunes it meanwhile.

        If the newest is meant and is damaged, an older one is given, and that is said.

        Raises:
            UserError: as `find`, or it is damaged.
        """
        if self.step is not None:
            self.find(checkpoints)
        with reading(checkpoints, self.step) as found:
            yield found


NEWEST = ModelChoice()


def restore(state: TrainState, checkpoint: Path, *, notes: tuple[str, ...] = ()) -> None:
    """Puts a checkpoint back into a freshly built state.

    Args:
        state: is changed.
        checkpoint: a whole one.
        notes: what the result has to say besides what the checkpoint says.

    Raises:
        UserError: as `restore_weights`.
    """
    restore_weights(state, checkpoint)
    state.notes = tuple(dict.fromkeys([*state.notes, *notes]))
    if not has_optimizer(checkpoint):
        raise UserError(f"{checkpoint} {WEIGHTS_ONLY}")
    if (checkpoint / OPTIMIZER).exists():
        moments = load_file(checkpoint / OPTIMIZER)
    else:
        moments = read_shards(state.names, checkpoint / OPTIMIZER_SHARDS)
    _check(checkpoint / OPTIMIZER, moments)
    restore_state(state.optimizer, state.names, moments)


def restore_weights(state: TrainState, checkpoint: Path) -> None:
    """Puts back the weights, their moving average and the step, and leaves the optimizer fresh.

    Raises:
        UserError: the checkpoint belongs to another kind of training, or holds what is not finite.
    """
    facts = json.loads((checkpoint / STATE).read_text())
    state.read_weights(checkpoint, facts)
    _check(checkpoint, {name: parameter for parameter, name in state.names.items()})
    state.step = int(facts["step"])
    state.notes = tuple(facts.get("notes", ()))
    state.extra = {key: facts[key] for key in EXTRA if key in facts}


def save_lora(
    transformer: WanTransformer3DModel, folder: Path, layers: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the adapter as diffusers' `load_lora_weights` expects it.

    Its settings go along: without them a loader would take alpha for the rank.

    Args:
        transformer: that has it.
        folder: gets it.
        layers: its weights; None: as they are in the transformer.
    """
    if layers is None:
        layers = get_peft_model_state_dict(transformer)
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


def load_transformer(
    transformer: WanTransformer3DModel, checkpoint: Path, *, ema: bool = False
) -> None:
    """Puts the trained weights of a checkpoint into a transformer built from the same recipe.

    Args:
        transformer: with the adapter already added, for LoRA.
        checkpoint: a `step-*` folder.
        ema: take the moving average instead of the last weights.

    Raises:
        UserError: there are no such weights, some are not finite, or the adapter is of another
            transformer.
    """
    shards = checkpoint / shards_of(AVERAGE if ema else TRANSFORMER)
    if shards.is_dir():
        own = dict(transformer.named_parameters()) if ema else transformer.state_dict()
        own = {name: tensor.detach() for name, tensor in own.items()}
        read_into(own, shards)
        _check(shards, own)
    elif ema:
        average = load_file(checkpoint / AVERAGE)
        _check(checkpoint / AVERAGE, average)
        copy_weights(average, transformer)
    elif (checkpoint / LORA_FILE).exists():
        layers = load_file(checkpoint / LORA_FILE)
        _check(checkpoint / LORA_FILE, layers)
        layers = {name.removeprefix(LORA_PREFIX): value for name, value in layers.items()}
        # peft leaves what is missing as it was drawn
        own = get_peft_model_state_dict(transformer)
        odd = sorted(layers.keys() ^ own.keys())
        if odd:
            raise UserError(
                f"{checkpoint}: its LoRA does not fit the transformer, e.g. {odd[0]}: take the "
                "model that it was trained on"
            )
        if has_shards(list(own.values())):
            _load_whole(own, layers)
        else:
            set_peft_model_state_dict(transformer, layers)
    elif (checkpoint / TRANSFORMER).is_dir():
        loaded = load_pretrained(
            WanTransformer3DModel,
            checkpoint / TRANSFORMER,
            setting="checkpoint",
            use_safetensors=True,
        )
        weights = loaded.state_dict()
        _check(checkpoint / TRANSFORMER, weights)
        own = transformer.state_dict()
        if has_shards(list(own.values())):
            _load_whole(own, weights)
        else:
            transformer.load_state_dict(weights)
    else:
        raise UserError(f"{checkpoint}: no transformer and no LoRA weights there")


def shards_of(file: str) -> str:
    """The folder with the parts of what ranks that hold it whole write to a file."""
    return Path(file).stem + SHARDS


def _load_whole(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copies whole weights into a state of which this rank holds a part.

    Raises:
        RuntimeError: names or shapes differ, as torch's `load_state_dict` raises it.
    """
    if odd := sorted(own.keys() ^ weights.keys()):
        raise RuntimeError(f"only one of the two has {odd[0]}")
    for name, target in own.items():
        copy_whole(target, weights[name])


@torch.no_grad()
def copy_weights(values: Mapping[str, Tensor], transformer: nn.Module) -> None:
    """Copies values into the parameters of these names."""
    parameters = dict(transformer.named_parameters())
    for name, value in values.items():
        copy_whole(parameters[name], value)


def _check(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses what is not finite; nothing that trains has to be other than zero."""
    parts = ((name, local_part(tensor)) for name, tensor in tensors.items())
    check_weights(str(where), parts, fix=DAMAGED, may_be_zero=True)


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not p.requires_grad}


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """The module's state without frozen parameters, which come from elsewhere."""
    kept = {k: v for k, v in module.state_dict().items() if k not in _frozen(module)}
    return {k: v.detach().cpu().contiguous() for k, v in kept.items()}


def _restore_trained(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = module.state_dict().keys() - _frozen(module)
    if tensors.keys() != expected:
        odd = sorted(tensors.keys() ^ expected)[0]
        raise UserError(f"checkpoint: the objectives of the recipe do not fit it, e.g. {odd}")
    module.load_state_dict(tensors, strict=False)


def named_state(optimizer: torch.optim.Optimizer, names: dict[Any, str]) -> dict[str, Tensor]:
    """Every state tensor under `<parameter name>|<state name>`.

    Args:
        optimizer: an optimizer whose state values are tensors (those of `build_optimizer` are).
        names: the name of each parameter that it updates.
    """
    return {
        f"{names[parameter]}{SEPARATOR}{key}": value.detach()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_state(
    optimizer: torch.optim.Optimizer, names: dict[Any, str], tensors: dict[str, Tensor]
) -> None:
    """Puts back what `named_state` gave.

    Raises:
        KeyError: a tensor belongs to no parameter of this optimizer.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, state_name = key.rsplit(SEPARATOR, 1)
        parameter = by_name[name]
        optimizer.state[parameter][state_name] = _placed(optimizer, parameter, value)


def _placed(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A copy where the optimizer has it: on a CPU what is loaded may be a view of the file."""
    if isinstance(optimizer, StepByTensor):
        return optimizer.placed(parameter, value)
    return placed(value, parameter)
