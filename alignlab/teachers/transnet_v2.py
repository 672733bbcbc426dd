"""TransNetV2's convolutions (arXiv 2008.04838): a small network trained on the cuts of videos.

Three stages of two blocks of four (2+1)-dimensional convolutions with growing dilation in time;
each stage halves a frame's sides and keeps the frames. What follows them (similarities of frames,
histograms, classifier) is not run. Trained on frames of 27x48 pixels, RGB in 0..1.

The first and the last 25 of the frames that the released code gives the network are there for the
others, and get no result: before and after a video they are copies of its first and last frame.
Here as well, since what the network sees of a clip's ends is otherwise what it was not trained on.

Shape letters: N clips, T frames, C channels, H and W pixels or patches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MODEL_TYPE = "transnet_v2"
DILATIONS = (1, 2, 4, 8)
BN_EPS = 1e-3
BORDER = 25  # frames


@dataclass(frozen=True)
class TransNetConfig:
    """Sizes of the network.

    Args:
        filters: of one convolution of the first stage; each stage doubles them.
        stages: how many.
        blocks: of a stage.
        tubelet_size: frames per token.
    """

    filters: int = 16
    stages: int = 3
    blocks: int = 2
    tubelet_size: int = 1
    model_type: str = MODEL_TYPE


def stage_widths(config: TransNetConfig) -> tuple[int, ...]:
    """Channels of each stage."""
    return tuple(len(DILATIONS) * config.filters * 2**stage for stage in range(config.stages))


def stage_strides(config: TransNetConfig) -> tuple[int, ...]:
    """Pixels per place of each stage's output, in each direction."""
    return tuple(2 ** (stage + 1) for stage in range(config.stages))


class TransNetOutput(NamedTuple):
    """Output of each stage, (N, D, T, H, W); none of those in which nothing of a frame is left."""

    stages: tuple[Tensor, ...]


def stage_output(out: TransNetOutput, stage: int) -> Tensor:
    """(N, D, T, H, W) of a stage, counted from 1."""
    return out.stages[stage - 1]


class TransNet(nn.Module):
    """The convolutions; names of weights are those of the released checkpoint."""

    def __init__(self, config: TransNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = (3, *stage_widths(config))
        self.SDDCNN = nn.ModuleList(
            _Stage(widths[stage], config.filters * 2**stage, config.blocks)
            for stage in range(config.stages)
        )

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> TransNetOutput:
        """Runs it on clips.

        Args:
            pixel_values: (N, T, C, H, W) in 0..1.
            output_hidden_states: there are no others.
        """
        first, last = pixel_values[:, :1], pixel_values[:, -1:]
        before, after = (frame.expand(-1, BORDER, -1, -1, -1) for frame in (first, last))
        x = torch.cat([before, pixel_values, after], dim=1).transpose(1, 2)
        outputs: list[Tensor] = []
        for stage in self.SDDCNN:
            if min(x.shape[-2:]) < 2:
                break
            x = stage(x)
            outputs.append(x[:, :, BORDER:-BORDER])
        return TransNetOutput(tuple(outputs))


class _Stage(nn.Module):
    def __init__(self, width: int, filters: int, blocks: int) -> None:
        super().__init__()
        inner = len(DILATIONS) * filters
        self.DDCNN = nn.ModuleList(
            _Block(width if block == 0 else inner, filters) for block in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.DDCNN[0](x)
        for block in self.DDCNN[1:]:
            x = block(x.relu())
        # the shortcut is of the first block's output, after its activation if others follow
        shortcut = first.relu() if len(self.DDCNN) > 1 else first
        return nn.functional.avg_pool3d(x.relu() + shortcut, (1, 2, 2))


class _Block(nn.Module):
    """Four convolutions side by side, their channels normalised together."""

    def __init__(self, width: int, filters: int) -> None:
        super().__init__()
        for dilation in DILATIONS:
            self.add_module(f"Conv3D_{dilation}", _Convolution(width, filters, dilation))
        self.bn = nn.BatchNorm3d(len(DILATIONS) * filters, eps=BN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.get_submodule(f"Conv3D_{dilation}")(x) for dilation in DILATIONS]
        normed: Tensor = self.bn(torch.cat(parts, dim=1))
        return normed


class _Convolution(nn.Module):
    """3x3 over a frame, then 3 over time, with frames left out between."""

    def __init__(self, width: int, filters: int, dilation: int) -> None:
        super().__init__()
        space = nn.Conv3d(width, 2 * filters, (1, 3, 3), padding=(0, 1, 1), bias=False)
        time = nn.Conv3d(
            2 * filters,
            filters,
            (3, 1, 1),
            padding=(dilation, 0, 0),
            dilation=(dilation, 1, 1),
            bias=False,
        )
        self.layers = nn.Sequential(space, time)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def empty_model(config: TransNetConfig) -> nn.Module:
    """The network without weights."""
    with torch.device("meta"):
        return TransNet(config)


def stage_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights and running statistics of the convolutions.

    Raises:
        ValueError: there are none.
    """
    found = {name: value for name, value in checkpoint.items() if name.startswith("SDDCNN.")}
    if not found:
        raise ValueError("has no SDDCNN, so it is no checkpoint of TransNetV2")
    return found
