"""SAM 2's image encoder from Meta's checkpoints, run by the code of the package `sam2`.

The package (extra `alignlab[sam2]`) is a third party's upload of Meta's code
(facebookresearch/sam2); its modules of models are those of Meta's repository, byte for byte. What
it does to images needs torchvision and is not imported: pixels are prepared here, by the same
numbers (bilinear with antialiasing, ImageNet's mean and deviation).

Shape letters: N images, H and W of a stage, D its width.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from alignlab.errors import UserError

MODEL_TYPE = "sam2_package"
PREFIX = "image_encoder.trunk."
RELEASED = {
    f"{version}_hiera_{size}": f"{version}_hiera_{short}"
    for version in ("sam2", "sam2.1")
    for size, short in (("tiny", "t"), ("small", "s"), ("base_plus", "b+"), ("large", "l"))
}
"""Config by the name of Meta's file."""
PATCH_STRIDE = 4  # of Hiera's patch embedding, which no config changes


@dataclass(frozen=True)
class HieraConfig:
    """A Hiera backbone, by the names that transformers has for its settings.

    Args:
        name: of the package's config.
        arguments: of the package's class, by name.
        embed_dim_per_stage: widths.
        blocks_per_stage: blocks.
        window_size_per_stage: sides of the windows, in tokens.
        query_stride: by how much a stage is coarser than the one before it.
        num_query_pool_stages: how many stages are.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...]
    embed_dim_per_stage: tuple[int, ...]
    blocks_per_stage: tuple[int, ...]
    window_size_per_stage: tuple[int, ...]
    query_stride: tuple[int, int]
    num_query_pool_stages: int
    patch_stride: tuple[int, int] = (PATCH_STRIDE, PATCH_STRIDE)
    model_type: str = MODEL_TYPE


def config_name_of(file: Path, name: str | None) -> str:
    """The name of the config of a checkpoint.

    Args:
        file: of the checkpoint.
        name: that the recipe gives, such as `sam2.1_hiera_l`, also as the package writes it
            (`configs/sam2.1/sam2.1_hiera_l.yaml`).

    Raises:
        UserError: there is no such config, or none is named and the file's name tells none.
    """
    known = sorted(RELEASED.values())
    if name is None:
        if file.stem not in RELEASED:
            raise UserError(
                f"teachers (sam2): which model {file} holds is not to be told from its name: set "
                f"teachers.<alias>.config to one of {', '.join(known)}"
            )
        return RELEASED[file.stem]
    short = name.rsplit("/", 1)[-1].removesuffix(".yaml")
    if short not in known:
        raise UserError(f"teachers (sam2) config: no {name}: choose from {', '.join(known)}")
    return short


def read_config(file: Path, name: str | None) -> HieraConfig:
    """The settings of a checkpoint's backbone, of the package's config.

    Raises:
        UserError: there is no such config, or the package is not installed.
    """
    short = config_name_of(file, name)
    if importlib.util.find_spec("sam2") is None:
        raise UserError(
            f"teachers (sam2): {file} is read by Meta's package, which is not installed: "
            "pip install 'alignlab[sam2]' (docs/teachers.md), or name a transformers folder"
        )
    import sam2
    from omegaconf import OmegaConf

    source = Path(sam2.__path__[0]) / "configs" / short.split("_")[0] / f"{short}.yaml"
    whole: Any = OmegaConf.to_container(OmegaConf.load(source))
    trunk = dict(whole["model"]["image_encoder"]["trunk"])
    del trunk["_target_"]
    hiera = _hiera(trunk)
    ends = [-1, *hiera.stage_ends]
    return HieraConfig(
        name=short,
        arguments=tuple((key, _hashable(value)) for key, value in sorted(trunk.items())),
        embed_dim_per_stage=tuple(reversed(hiera.channel_list)),
        blocks_per_stage=tuple(end - start for start, end in pairwise(ends)),
        window_size_per_stage=tuple(hiera.window_spec),
        query_stride=tuple(hiera.q_stride),
        num_query_pool_stages=len(hiera.q_pool_blocks),
    )


def _hiera(arguments: Mapping[str, Any]) -> Any:
    """The backbone without weights, on the device meta."""
    from sam2.modeling.backbones.hieradet import Hiera

    with _MetaParameters():
        return Hiera(**arguments)


class _MetaParameters(TorchFunctionMode):
    """Makes what modules allocate on the device meta, and draws no random numbers for it.

    `torch.device("meta")` would do so with numbers, too, which the package's class reads.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.empty, torch.zeros) and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def trunk_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The backbone's weights in a checkpoint, by the names that `HieraTrunk` has for them.

    Raises:
        ValueError: it holds no SAM 2.
    """
    model = checkpoint.get("model")
    if not isinstance(model, Mapping):
        raise ValueError("holds no 'model': no checkpoint of SAM 2")
    weights = {
        f"trunk.{name.removeprefix(PREFIX)}": value
        for name, value in model.items()
        if name.startswith(PREFIX) and isinstance(value, Tensor)
    }
    if not weights:
        raise ValueError(f"has no weights {PREFIX}*: no checkpoint of SAM 2")
    return weights


class HieraTrunk(nn.Module):
    """The package's backbone, called as transformers' is.

    Args:
        config: its shape.
    """

    def __init__(self, config: HieraConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = _hiera(dict(config.arguments))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    def forward(self, pixel_values: Tensor, *, output_hidden_states: bool = False) -> Any:
        """Outputs of the stages, (N, H, W, D) each, as `intermediate_hidden_states`.

        Args:
            pixel_values: (N, 3, height, width), normalised.
            output_hidden_states: there are no others.
        """
        stages_NDHW: list[Tensor] = self.trunk(pixel_values)
        stages = tuple(stage_NDHW.permute(0, 2, 3, 1) for stage_NDHW in stages_NDHW)
        return SimpleNamespace(intermediate_hidden_states=stages)
