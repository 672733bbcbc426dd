"""The folder that a Stage 1 training leaves and a Stage 2 objective reads.

model.safetensors   weights of the network
stage1.json         `Stage1Info`: which network, and what it was trained on
"""

import json
from pathlib import Path
from typing import Literal, overload

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig
from alignlab.losses.stage1.saliency_aligner import SaliencyAligner, SaliencyAlignerConfig

WEIGHTS = "model.safetensors"
INFO = "stage1.json"

Kind = Literal["sara", "moalign"]


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
        kind: which network: a `SaliencyAligner` or a `MotionHead`.
        teacher: whose tokens it reads.
        teacher_dim: their width.
        grid: (H, W) of the tokens in training.
        text: the model whose text encoder gave the embeddings; None where there is no text.
        module: shape of the network.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    teacher: Stage1Teacher
    teacher_dim: int
    grid: tuple[int, int]
    text: str | None = None
    module: SaliencyAlignerConfig | MotionHeadConfig

    @model_validator(mode="after")
    def _fits_together(self) -> "Stage1Info":
        expected = {"sara": SaliencyAlignerConfig, "moalign": MotionHeadConfig}[self.kind]
        if not isinstance(self.module, expected):
            raise ValueError(f"module is no {expected.__name__}, which {self.kind} has")
        if self.module.teacher_dim != self.teacher_dim:
            raise ValueError(
                f"teacher_dim {self.teacher_dim} is not the module's {self.module.teacher_dim}"
            )
        return self


def save_stage1(folder: Path, module: SaliencyAligner | MotionHead, info: Stage1Info) -> None:
    """Writes weights and info into `folder`, which exists."""
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / INFO).write_text(json.dumps(info.model_dump(mode="json"), indent=1))


def read_stage1_info(folder: str | Path, kind: Kind) -> Stage1Info:
    """Reads what `load_stage1` would load, without the weights.

    Raises:
        ValueError: there is no Stage 1 folder, its info is damaged, or it is of the other kind.
            One line.
    """
    path = Path(folder) / INFO
    if not path.is_file():
        raise ValueError(
            f"{folder} is no Stage 1 folder: it has no {INFO}; `alignlab stage1 {kind} RECIPE` "
            "makes one"
        )
    try:
        info = Stage1Info.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{path}: {where + ': ' if where else ''}{problem['msg']}") from error
    if info.kind != kind:
        raise ValueError(f"{folder} holds a Stage 1 of {info.kind}, not of {kind}")
    return info


@overload
def load_stage1(
    folder: str | Path, kind: Literal["sara"]
) -> tuple[SaliencyAligner, Stage1Info]: ...
@overload
def load_stage1(folder: str | Path, kind: Literal["moalign"]) -> tuple[MotionHead, Stage1Info]: ...
def load_stage1(folder: str | Path, kind: Kind) -> tuple[SaliencyAligner | MotionHead, Stage1Info]:
    """Loads a trained network, frozen and in evaluation mode, on the CPU.

    Raises:
        ValueError: as `read_stage1_info`, or the weights are missing, damaged or of another shape.
            One line.
    """
    info = read_stage1_info(folder, kind)
    module: SaliencyAligner | MotionHead
    if isinstance(info.module, SaliencyAlignerConfig):
        module = SaliencyAligner(info.module)
    else:
        module = MotionHead(info.module)
    path = Path(folder) / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read: {reason}") from error
    expected = {name: value.shape for name, value in module.state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        odd = min(name for name in expected | found if expected.get(name) != found.get(name))
        raise ValueError(f"{path}: does not fit {INFO}, e.g. {odd}")
    module.load_state_dict(tensors)
    return module.requires_grad_(False).eval(), info
