"""Stage 1 networks: the table of their kinds, and the folder in which a trained one is kept.

A Stage 1 training leaves such a folder, and a Stage 2 objective reads it:

model.safetensors   weights of the network
stage1.json         `Stage1Info`: which network, and what it was trained on
"""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from alignlab.kernels.plugins import one_line
from alignlab.losses.plugins import installed_rows
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig
from alignlab.losses.stage1.saliency_aligner import SaliencyAligner, SaliencyAlignerConfig

WEIGHTS = "model.safetensors"
INFO = "stage1.json"

GROUP = "alignlab.stage1"
"""Entry point group under which other packages register a `Stage1Row`."""

Kind = str
"""Name of a row: that of the objective which reads the network."""


@dataclass(frozen=True)
class Stage1Row:
    """One kind of Stage 1 network.

    Args:
        network: built as `network(config)`; everything that it has learnt is in its state dict.
        config: its shape, frozen, with a field `teacher_dim`: the width of the tokens it reads.
        setting: of the objective's config: the one that names the folder of a trained network.
    """

    network: type[nn.Module]
    config: type[BaseModel]
    setting: str


BUILT_IN: dict[Kind, Stage1Row] = {
    "sara": Stage1Row(SaliencyAligner, SaliencyAlignerConfig, setting="aligner"),
    "moalign": Stage1Row(MotionHead, MotionHeadConfig, setting="head"),
}


def installed_stage1(built_in: Mapping[Kind, Stage1Row]) -> dict[Kind, Stage1Row]:
    """Loads the rows of other packages, by name, in the order of their names.

    Args:
        built_in: rows whose names are taken.

    Raises:
        PluginError: a name is taken, or what it stands for is no `Stage1Row` as described there.
    """
    return installed_rows(GROUP, "Stage 1 network", built_in, Stage1Row, _problem)


def _problem(thing: Stage1Row) -> str | None:
    """Says what keeps a row from being used."""
    if not (isinstance(thing.network, type) and issubclass(thing.network, nn.Module)):
        return "has a network that is no class derived from torch.nn.Module"
    if not (isinstance(thing.config, type) and issubclass(thing.config, BaseModel)):
        return "has a config that is no class derived from pydantic.BaseModel"
    if "teacher_dim" not in thing.config.model_fields:
        return f"has a config, {thing.config.__name__}, without the field teacher_dim"
    return None


@functools.cache
def stage1_rows() -> dict[Kind, Stage1Row]:
    """Gives `BUILT_IN` and what installed packages add, looked up at the first call."""
    return BUILT_IN | installed_stage1(BUILT_IN)


class Stage1Teacher(BaseModel):
    """The teacher whose tokens the network reads.

    Args:
        family: as in a recipe's `teachers`; so are `path` and `feature`.
        weights: digest of its weights; None if it was not recorded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    path: str
    feature: str
    weights: str | None = None


class Stage1Info(BaseModel):
    """What a Stage 1 network is and what it was trained on.

    Args:
        kind: which network: a name in `stage1_rows`.
        teacher: whose tokens it reads.
        teacher_dim: their width.
        grid: (H, W) of the tokens in training.
        text: the model whose text encoder gave the embeddings; None where there is no text.
        module: shape of the network, of the row's config class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    teacher: Stage1Teacher
    teacher_dim: int
    grid: tuple[int, int]
    text: str | None = None
    module: SerializeAsAny[BaseModel]

    @field_validator("kind")
    @classmethod
    def _kind_has_a_row(cls, kind: Kind) -> Kind:
        if kind not in stage1_rows():
            *names, last = map(repr, stage1_rows())
            raise PydanticCustomError(
                "stage1_kind", "Input should be {names}", {"names": f"{', '.join(names)} or {last}"}
            )
        return kind

    @field_validator("module", mode="before")
    @classmethod
    def _module_is_of_the_kind(cls, module: object, info: ValidationInfo) -> object:
        if "kind" not in info.data:  # which is refused already
            return module
        kind = info.data["kind"]
        config = stage1_rows()[kind].config
        if isinstance(module, config):
            return module
        problem = f"module is no {config.__name__}, which {kind} has"
        if isinstance(module, BaseModel):
            raise ValueError(problem)
        try:
            return config.model_validate(module)
        except ValidationError as error:
            raise ValueError(f"{problem}: {_first_line(error)}") from error

    @model_validator(mode="after")
    def _teacher_dims_agree(self) -> Self:
        module_dim = getattr(self.module, "teacher_dim", None)
        if module_dim != self.teacher_dim:
            raise ValueError(f"teacher_dim {self.teacher_dim} is not the module's {module_dim}")
        return self


def _first_line(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where + ': ' if where else ''}{problem['msg']}"


def save_stage1(folder: Path, module: nn.Module, info: Stage1Info) -> None:
    """Writes weights and info into `folder`, which exists."""
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / INFO).write_text(json.dumps(info.model_dump(mode="json"), indent=1))


def read_stage1_info(folder: str | Path, kind: Kind) -> Stage1Info:
    """Reads what `load_stage1` would load, without the weights.

    Raises:
        ValueError: there is no Stage 1 folder, its info is damaged, or it is of another kind.
            One line.
    """
    stage1_rows()  # a package that is broken is named as such, not taken for a damaged folder
    path = _expanded(folder) / INFO
    if not path.is_file():
        raise ValueError(
            f"{folder} is no Stage 1 folder: it has no {INFO}; `alignlab stage1 {kind} RECIPE` "
            "makes one"
        )
    try:
        info = Stage1Info.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error
    if info.kind != kind:
        raise ValueError(f"{folder} holds a Stage 1 of {info.kind}, not of {kind}")
    return info


def _expanded(folder: str | Path) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise ValueError(f"{folder}: there is no such home folder") from None


def load_stage1(folder: str | Path, kind: Kind) -> tuple[Any, Stage1Info]:
    """Loads a trained network, frozen and in evaluation mode, on the CPU.

    Returns:
        The network, which is of the row's class, and what was written beside it.

    Raises:
        ValueError: as `read_stage1_info`, or the weights are missing, damaged or of another shape.
            One line.
    """
    info = read_stage1_info(folder, kind)
    network = stage1_rows()[kind].network(info.module)
    path = _expanded(folder) / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error
    expected = {name: value.shape for name, value in network.state_dict().items()}
    saved = {name: value.shape for name, value in tensors.items()}
    if saved != expected:
        odd = min(name for name in expected | saved if expected.get(name) != saved.get(name))
        raise ValueError(f"{path}: does not fit {INFO}, e.g. {odd}")
    network.load_state_dict(tensors)
    return network.requires_grad_(False).eval(), info


_widths: ContextVar[Mapping[str, int] | None] = ContextVar("_widths", default=None)


@contextmanager
def without_weights(**widths: int) -> Iterator[None]:
    """Inside, `load_for_teacher` reads no weights: networks keep those that their class draws.

    One whose folder is not there has its class's default shape.

    Args:
        widths: of what the network is given besides a teacher's tokens, by name in its config.
    """
    token = _widths.set(widths)
    try:
        yield
    finally:
        _widths.reset(token)


def _network_without_weights(
    folder: str | Path, kind: Kind, teacher_dim: int, widths: Mapping[str, int]
) -> nn.Module:
    row = stage1_rows()[kind]
    if (_expanded(folder) / INFO).is_file():
        config = read_stage1_info(folder, kind).module
    else:
        known = {"teacher_dim": teacher_dim, **widths}
        config = row.config(**{k: v for k, v in known.items() if k in row.config.model_fields})
    return row.network(config).requires_grad_(False).eval()


def load_for_teacher(folder: str | Path, kind: Kind, teacher: str, teacher_dim: int) -> nn.Module:
    """Loads a trained network as `load_stage1` does, for the tokens of a run's teacher.

    Args:
        folder: as the objective's config names it.
        kind: name of the row.
        teacher: its alias, as in messages.
        teacher_dim: width of its tokens.

    Raises:
        ValueError: as `load_stage1`, or the network reads tokens of another width. One line.
    """
    widths = _widths.get()
    if widths is not None:
        return _network_without_weights(folder, kind, teacher_dim, widths)
    network, info = load_stage1(folder, kind)
    if info.teacher_dim != teacher_dim:
        raise ValueError(
            f"{folder} reads teacher tokens of width {info.teacher_dim}, "
            f"{teacher} has {teacher_dim}"
        )
    assert isinstance(network, nn.Module)
    return network
