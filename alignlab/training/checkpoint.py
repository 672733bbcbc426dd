"""Checkpoints: safetensors and JSON in a folder that is there whole or not at all.

checkpoints/step-000500/
    transformer/                         all weights (full fine-tuning), or
    pytorch_lora_weights.safetensors     the adapter, as diffusers' pipelines load it
    objectives.safetensors               projectors, state of plateau stops
    optimizer.safetensors                AdamW moments, by parameter name
    ema.safetensors                      the moving average, if there is one
    state.json                           step, hash of frozen Stage 1 networks
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.errors import UserError
from alignlab.runs.digest import frozen_digest
from alignlab.runs.run_folder import remove_folder, whole_folder
from alignlab.training.optimizer_state import named_state, restore_state

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_PREFIX = "transformer."


@dataclass
class TrainState:
    """All that changes during training.

    Args:
        transformer: the diffusers model itself, without wrappers.
        objectives: projectors of all objectives; may have no parameter.
        optimizer: over `names`.
        ema: moving average of the trained transformer parameters by name, or None.
        step: optimizer steps done.
    """

    transformer: WanTransformer3DModel
    objectives: nn.Module
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] | None
    step: int = 0
    names: dict[nn.Parameter, str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = {
            p: f"{part}.{name}"
            for part, module in (("transformer", self.transformer), ("objectives", self.objectives))
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    @property
    def is_lora(self) -> bool:
        return bool(getattr(self.transformer, "peft_config", None))


def latest(checkpoints: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = _by_step(checkpoints)
    return found[-1] if found else None


def step_path(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:06d}"


def prune(checkpoints: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for old in _by_step(checkpoints)[:-keep]:
        remove_folder(old)


def save(state: TrainState, checkpoints: Path, *, keep: int) -> Path:
    """Writes `step-<step>` and removes all but the newest `keep` checkpoints."""
    target = step_path(checkpoints, state.step)
    with whole_folder(target) as folder:
        if state.is_lora:
            save_lora(state.transformer, folder)
        else:
            state.transformer.save_pretrained(folder / "transformer")
        save_file(_trained(state.objectives), folder / "objectives.safetensors")
        save_file(named_state(state.optimizer, state.names), folder / "optimizer.safetensors")
        if state.ema is not None:
            save_file(state.ema, folder / "ema.safetensors")
        facts = {"step": state.step, "frozen": frozen_digest(state.objectives)}
        (folder / "state.json").write_text(json.dumps(facts))
    prune(checkpoints, keep)
    return target


def save_lora(transformer: WanTransformer3DModel, folder: Path) -> None:
    """Writes the adapter as diffusers' `load_lora_weights` expects it.

    Its settings go along: without them a loader would take alpha for the rank.
    """
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


def restore(state: TrainState, checkpoint: Path) -> None:
    """Puts a checkpoint back into a freshly built state.

    Raises:
        UserError: the checkpoint belongs to another kind of training.
    """
    facts = json.loads((checkpoint / "state.json").read_text())
    if facts["frozen"] != frozen_digest(state.objectives):
        raise UserError(
            f"{checkpoint}: a Stage 1 network that the objectives read has changed since; "
            "bring it back, or start a new run under another name"
        )
    load_transformer(state.transformer, checkpoint)
    _restore_trained(state.objectives, load_file(checkpoint / "objectives.safetensors"))
    restore_state(state.optimizer, state.names, load_file(checkpoint / "optimizer.safetensors"))
    if state.ema is not None:
        for name, value in load_file(checkpoint / "ema.safetensors").items():
            state.ema[name].copy_(value)
    state.step = int(facts["step"])


def load_transformer(
    transformer: WanTransformer3DModel, checkpoint: Path, *, ema: bool = False
) -> None:
    """Puts the trained weights of a checkpoint into a transformer built from the same recipe.

    Args:
        transformer: with the adapter already added, for LoRA.
        checkpoint: a `step-*` folder.
        ema: take the moving average instead of the last weights.
    """
    if ema:
        average = load_file(checkpoint / "ema.safetensors")
        parameters = dict(transformer.named_parameters())
        with torch.no_grad():
            for name, value in average.items():
                parameters[name].copy_(value)
    elif (checkpoint / LORA_FILE).exists():
        layers = load_file(checkpoint / LORA_FILE)
        set_peft_model_state_dict(
            transformer, {k.removeprefix(LORA_PREFIX): v for k, v in layers.items()}
        )
    elif (checkpoint / "transformer").is_dir():
        weights = WanTransformer3DModel.from_pretrained(
            checkpoint / "transformer", use_safetensors=True
        ).state_dict()
        transformer.load_state_dict(weights)
    else:
        raise UserError(f"{checkpoint}: no transformer and no LoRA weights there")


def _by_step(checkpoints: Path) -> list[Path]:
    """Oldest first; by number, since names of more than six digits do not sort."""
    return sorted(checkpoints.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))


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
