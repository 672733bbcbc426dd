"""The two transformers of a Wan 2.2 A14B pipeline: which is which, at which noise levels, and the
one of them that a run does not train.

As in diffusers' WanPipeline, `transformer` denoises timesteps from 1000 times the `boundary_ratio`
of model_index.json upwards (high noise), `transformer_2` those below (low noise).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from alignlab.config.model import Expert, ModelConfig
from alignlab.errors import UserError
from alignlab.models.model_files import local_folder, read_object

INDEX = "model_index.json"
TRANSFORMERS: Mapping[Expert, str] = MappingProxyType(
    {"high": "transformer", "low": "transformer_2"}
)
"""Sub-folder of each expert."""


@dataclass(frozen=True)
class Window:
    """The noise levels that a transformer denoises: from `low` up to `high`, 1 is pure noise.

    `high` itself is the other expert's, unless it is 1.
    """

    low: float
    high: float

    def at(self, share: float) -> float:
        """The level at a share of the way from `low` to `high`."""
        return self.low + (self.high - self.low) * share

    def share(self, level: float) -> float:
        """Where a level lies in it, 0 to 1."""
        return (level - self.low) / (self.high - self.low)

    def holds(self, level: float) -> bool:
        """Whether this transformer denoises at a level, by its timestep as in WanPipeline."""
        t = 1000 * level
        return 1000 * self.low <= t and (self.high == 1.0 or t < 1000 * self.high)

    @cached_property
    def ends(self) -> tuple[float, float]:
        """Its lowest and highest level in fp32, in which batches hold levels.

        A level belongs to it by its timestep, 1000 times the level, in fp32 as well.
        """
        if self.high == 1.0:
            return _first(self.low), 1.0
        zero = torch.zeros(())
        return _first(self.low), float(torch.nextafter(torch.tensor(_first(self.high)), zero))


WHOLE = Window(0.0, 1.0)


def _first(level: float) -> float:
    """The lowest fp32 level whose timestep is not below that of `level`."""
    zero, one, found = torch.zeros(()), torch.ones(()), torch.tensor(level, dtype=torch.float32)
    if level == 0.0:
        return 0.0
    while float(torch.nextafter(found, zero) * 1000) >= level * 1000:
        found = torch.nextafter(found, zero)
    while float(found * 1000) < level * 1000:
        found = torch.nextafter(found, one)
    return float(found)


def noise_window(model: ModelConfig) -> Window:
    """The noise levels that a run trains; only with `model.expert` is a file read.

    Raises:
        UserError: see `check_index`.
    """
    if model.expert is None:
        return WHOLE
    boundary = _boundary(check_index(model.path, model.expert), model.path)
    return Window(boundary, 1.0) if model.expert == "high" else Window(0.0, boundary)


def transformer_part(expert: Expert | None) -> str:
    """Sub-folder of the transformer that is trained."""
    return "transformer" if expert is None else TRANSFORMERS[expert]


def other_part(expert: Expert) -> str:
    """Sub-folder of the other one."""
    return next(part for name, part in TRANSFORMERS.items() if name != expert)


def check_index(path: str, expert: Expert | None) -> dict[str, Any]:
    """The model_index.json of a pipeline: of one on the hub nothing else is fetched.

    Args:
        path: see `alignlab.models.wan.load_wan`.
        expert: that is trained, of a pipeline with two transformers.

    Raises:
        UserError: the folder or the hub id cannot be used, it has two transformers and `expert` is
            None or one and `expert` is not, or diffusers has no such scheduler.
    """
    import diffusers  # takes seconds, and the model card is made without it

    index = pipeline_index(path)
    two = has_two_transformers(index)
    if two and expert is None:
        raise UserError(
            f"model.path: {path} holds two transformers (Wan 2.2 experts), of which a run trains "
            "one: set model.expert to high or low"
        )
    if not two and expert is not None:
        raise UserError(
            f"model.expert: {path} holds one transformer, which is trained at all noise levels; "
            "remove the setting"
        )
    if two:
        _boundary(index, path)
    name = str(class_name(index, "scheduler"))
    if not hasattr(diffusers, name):
        raise UserError(f"model.path: {INDEX} of {path}: unknown scheduler {name}")
    return index


def pipeline_index(path: str, *, setting: str = "model.path") -> dict[str, Any]:
    """What the model_index.json of a pipeline holds; see `check_index`.

    Args:
        path: of the pipeline.
        setting: the recipe key that it came from, for messages.
    """
    folder = local_folder(path, setting=setting, marker=INDEX, patterns=[INDEX])
    return read_object(folder / INDEX, setting=setting)


def has_two_transformers(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json names a second transformer; TI2V-5B's has `[null, null]` there."""
    return class_name(index, "transformer_2") is not None


def class_name(index: Mapping[str, Any], part: str) -> Any:
    """The class that a model_index.json has for a part; None where it has none."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _boundary(index: Mapping[str, Any], path: str) -> float:
    boundary = index.get("boundary_ratio")
    if isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0 < boundary < 1:
        raise UserError(
            f"model.path: {INDEX} of {path}: boundary_ratio is {boundary!r}; with two transformers "
            "it has to lie between 0 and 1, where the one hands over to the other: fetch it again"
        )
    return float(boundary)
