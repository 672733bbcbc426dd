"""Which output of a teacher is its feature, and how wide and how fine that is.

Shape letters: N images or clips, L tokens of one, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignlab.errors import UserError
from alignlab.teachers import mobilenet_v2, transnet_v2
from alignlab.teachers.attention import LayerAttention
from alignlab.teachers.registry import ATTENTION, attention_layers, parse_feature


@dataclass(frozen=True)
class Feature:
    """What a teacher gives.

    Args:
        name: as in the recipe.
        dim: width D.
        stride: pixels of a frame per patch, in each direction.
        multiple: of how many pixels the height and the width of a frame must be multiples.
        hidden_states: the model has to return those of its blocks.
        read: takes the feature, (N, L, D), from the model's output; of attention maps that is what
            was recorded of its layers (`attention.py`).
        layers: whose attention is recorded.
        heads: of each of them.
    """

    name: str
    dim: int
    stride: int
    multiple: int
    hidden_states: bool
    read: Callable[[Any], Tensor]
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()


def find_feature(config: Any, family: str, name: str) -> Feature:
    """Looks a feature up in a model's settings.

    Args:
        config: of a transformers class of the family.
        family: row of `TEACHERS`.
        name: `pre_norm` (last block's output), `post_norm` (after the final norm), `layer:k`
            (output of block k, counted from 0), `stage:k` (of a Hiera backbone, counted from 1; of
            V-JEPA 2.1 the k-th block that has a norm of its own, after it), `merged` (after the
            layer that joins patches for a language model), or `attention:k` or `attention:k-m` (of
            each of these blocks, from 0, its queries and keys). Stages of a convolutional network
            begin where its outputs get coarser, and are counted from 1 as well.

    Raises:
        UserError: the model has no such feature.
    """
    try:
        kind, number = parse_feature(family, name)
    except ValueError as error:
        raise UserError(f"teachers feature: {error}") from None
    if kind == "stage:k" and family == "vjepa2":
        return _normed_block(config, name, number)
    if kind == "stage:k" and config.model_type in _CNNS:
        return _cnn_stage(config, name, number)
    if kind == "stage:k":
        return _hiera_stage(config, name, number)
    if kind == "merged":
        return _merged(config, name)
    if kind == "post_norm":
        # transformers builds VideoMAE without its norm if a classifier is to average the tokens
        if config.model_type == "videomae" and config.use_mean_pooling:
            raise UserError(
                "teachers feature: this model has no final norm (use_mean_pooling in its "
                "config.json): use pre_norm"
            )
        return _of_blocks(config, name, None)
    count = int(config.num_hidden_layers)
    if kind == ATTENTION:
        return _attention(config, name, count)
    if kind == "pre_norm":
        number = count - 1
    if number >= count:
        raise UserError(f"teachers feature: no {name}; the model has 0 to {count - 1}")
    return _of_blocks(config, name, number)


def _attention(config: Any, name: str, count: int) -> Feature:
    """Queries and keys of blocks as their attention gets them, one block after the other."""
    layers = attention_layers(name)
    if layers[-1] >= count:
        raise UserError(f"teachers feature: no {name}; the model has 0 to {count - 1}")
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    patch = int(config.patch_size)

    def read(recorded: list[LayerAttention]) -> Tensor:
        return torch.cat([layer.tokens(heads) for layer in recorded], -1)

    dim = len(layers) * 2 * width
    return Feature(name, dim, patch, patch, False, read, layers, (heads,) * len(layers))


def _of_blocks(config: Any, name: str, block: int | None) -> Feature:
    """Tokens of a plain vision transformer; block None is after the final norm."""

    def read(out: Any) -> Tensor:
        # hidden_states begins with the embedding and, for the models of the table, ends before
        # the final norm
        tokens_NLD: Tensor = (
            out.last_hidden_state if block is None else out.hidden_states[block + 1]
        )
        return tokens_NLD

    patch = int(config.patch_size)
    # a tower that merges patches takes whole blocks of them
    multiple = patch * int(getattr(config, "spatial_merge_size", 1))
    return Feature(name, int(config.hidden_size), patch, multiple, block is not None, read)


def _merged(config: Any, name: str) -> Feature:
    """Tokens of blocks of patches, as a language model gets them."""
    side = int(config.patch_size) * int(config.spatial_merge_size)
    return Feature(
        name, int(config.out_hidden_size), side, side, False, lambda out: out.pooler_output
    )


def _normed_block(config: Any, name: str, number: int) -> Feature:
    """Output of one of V-JEPA 2.1's blocks that have a norm, after it."""
    blocks = getattr(config, "norm_layers", ())
    if not blocks:
        raise UserError(
            f"teachers feature: no {name}; V-JEPA 2.0 has one norm after its last block, post_norm"
        )
    if number > len(blocks):
        raise UserError(f"teachers feature: no {name}; the model has stages 1 to {len(blocks)}")

    def read(out: Any) -> Tensor:
        tokens_NLD: Tensor = out.intermediate_hidden_states[number - 1]
        return tokens_NLD

    patch = int(config.patch_size)
    return Feature(name, int(config.hidden_size), patch, patch, True, read)


_CNNS: dict[str, Any] = {"mobilenet_v2": mobilenet_v2, "transnet_v2": transnet_v2}
"""By `model_type`."""


def _cnn_stage(config: Any, name: str, stage: int) -> Feature:
    """Output of a stage of a convolutional network, of images or of clips."""
    cnn = _CNNS[config.model_type]
    widths, strides = cnn.stage_widths(config), cnn.stage_strides(config)
    if stage > len(widths):
        raise UserError(f"teachers feature: no {name}; the model has stages 1 to {len(widths)}")
    width, stride = widths[stage - 1], strides[stage - 1]

    def read(out: Any) -> Tensor:
        map_ND: Tensor = cnn.stage_output(out, stage)  # then the frames of a clip, H and W
        return map_ND.flatten(2).mT

    return Feature(name, width, stride, stride, True, read)


def _hiera_stage(config: Any, name: str, stage: int) -> Feature:
    """Output of a stage; each of the first few stages after the first halves the resolution.

    Hiera tiles one learned window of position embeddings over its first stage, and pools whole
    windows, so that the frame must be a multiple of that window and of the coarsest patch: of 32
    pixels in every released model.
    """
    stages = len(config.blocks_per_stage)
    if stage > stages:
        raise UserError(f"teachers feature: no {name}; the model has stages 1 to {stages}")
    patch, pool = int(config.patch_stride[0]), int(config.query_stride[0])
    pools = int(config.num_query_pool_stages)
    multiple = math.lcm(patch * int(config.window_size_per_stage[0]), patch * pool**pools)

    def read(out: Any) -> Tensor:
        stage_NHWD: Tensor = out.intermediate_hidden_states[stage - 1]
        return stage_NHWD.flatten(1, 2)

    stride = patch * pool ** min(stage - 1, pools)
    return Feature(name, int(config.embed_dim_per_stage[stage - 1]), stride, multiple, False, read)
