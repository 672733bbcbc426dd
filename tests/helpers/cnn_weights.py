"""MobileNetV2 and TransNetV2 written down plainly, on weights by the names of their authors.

Shape letters: N images or clips, T frames, C channels, H and W pixels.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]

# expansion, channels, blocks, first stride (table 2 of the paper)
MOBILENET = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
MOBILENET_STAGES = (3, 6, 13, 17)
"""Of `features`, the last at strides 4, 8, 16 and 32."""
DILATIONS = (1, 2, 4, 8)
BORDER = 25


def mobilenet_weights() -> Weights:
    """Random weights in torchvision's layout, without a classifier."""
    shapes: dict[str, tuple[int, ...]] = {"0.0": (32, 3, 3, 3)}
    before, block = 32, 1
    for expansion, channels, count, _ in MOBILENET:
        for _ in range(count):
            inner, name = before * expansion, f"{block}.conv"
            layers: list[tuple[int, ...]] = [(inner, 1, 3, 3), (channels, inner, 1, 1)]
            if expansion > 1:
                layers.insert(0, (inner, before, 1, 1))
            places = (0, 3, 6)[: len(layers)]
            shapes |= {f"{name}.{place}": s for place, s in zip(places, layers, strict=True)}
            before, block = channels, block + 1
    shapes["18.0"] = (1280, 320, 1, 1)
    rng = torch.Generator().manual_seed(0)
    weights: Weights = {}
    for name, shape in shapes.items():
        stem, _, place = name.rpartition(".")
        weights[f"features.{name}.weight"] = _drawn(shape, rng)
        weights |= _drawn_norm(f"features.{stem}.{int(place) + 1}", shape[0], rng)
    return weights


def transnet_weights() -> Weights:
    """Random weights of the convolutions, and one of what follows them."""
    rng = torch.Generator().manual_seed(0)
    weights: Weights = {"fc1.bias": torch.zeros(4)}
    before = 3
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(2):
            name = f"SDDCNN.{stage}.DDCNN.{block}"
            for dilation in DILATIONS:
                layers = f"{name}.Conv3D_{dilation}.layers"
                weights[f"{layers}.0.weight"] = _drawn((2 * filters, before, 1, 3, 3), rng)
                weights[f"{layers}.1.weight"] = _drawn((filters, 2 * filters, 3, 1, 1), rng)
            before = 4 * filters
            weights |= _drawn_norm(f"{name}.bn", before, rng)
    return weights


def _drawn(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    fan_in = torch.Size(shape[1:]).numel()
    # half precision is enough, and small on disk
    return torch.empty(shape).normal_(0, (2 / fan_in) ** 0.5, generator=rng).half()


def _drawn_norm(name: str, width: int, rng: torch.Generator) -> Weights:
    def drawn(around: float) -> Tensor:
        return torch.empty(width).uniform_(around - 0.3, around + 0.3, generator=rng)

    numbers = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    named = {f"{name}.{kind}": drawn(around) for kind, around in numbers.items()}
    return named | {f"{name}.num_batches_tracked": torch.tensor(7)}


def _normed(x: Tensor, weights: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    weight, bias, mean, var = (
        weights[f"{name}.{kind}"].float().view(-1, *[1] * (x.ndim - 2))
        for kind in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / (var + eps).sqrt() * weight + bias


def mobilenet_stages(weights: Mapping[str, Tensor], images_NCHW: Tensor) -> list[Tensor]:
    """Outputs of the four stages, (N, C, H, W), of normalised images."""
    maps = list(_mobilenet(weights, images_NCHW))
    return [maps[number] for number in MOBILENET_STAGES]


def _mobilenet(weights: Mapping[str, Tensor], x: Tensor) -> Iterator[Tensor]:
    def layer(x: Tensor, stem: str, place: int, stride: int = 1) -> Tensor:
        kernel = weights[f"{stem}.{place}.weight"].float()
        groups = x.shape[1] // kernel.shape[1]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        return _normed(x, weights, f"{stem}.{place + 1}", 1e-5)

    x = layer(x, "features.0", 0, stride=2).clamp(0, 6)
    yield x
    number = 0
    for expansion, channels, count, first_stride in MOBILENET:
        for i in range(count):
            number += 1
            stem, y, place = f"features.{number}.conv", x, 0
            if expansion > 1:
                y, place = layer(y, stem, 0).clamp(0, 6), 3
            y = layer(y, stem, place, stride=first_stride if i == 0 else 1).clamp(0, 6)
            y = layer(y, stem, place + 3)
            x = x + y if i else y
            assert x.shape[1] == channels
            yield x


def transnet_stages(weights: Mapping[str, Tensor], clips_NTCHW: Tensor) -> list[Tensor]:
    """Outputs of the stages, (N, C, T, H, W), of clips in 0..1, as far as the pixels reach."""
    frames = [0] * BORDER + list(range(clips_NTCHW.shape[1])) + [-1] * BORDER
    x = clips_NTCHW[:, frames].transpose(1, 2)
    stages = []
    for stage in range(3):
        if min(x.shape[3:]) < 2:
            break
        first = _transnet_block(weights, f"SDDCNN.{stage}.DDCNN.0", x).relu()
        second = _transnet_block(weights, f"SDDCNN.{stage}.DDCNN.1", first).relu()
        total, (height, width) = first + second, (side // 2 * 2 for side in first.shape[3:])
        quarters = [total[..., i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
        x = torch.stack(quarters).mean(0)
        stages.append(x[:, :, BORDER:-BORDER])
    return stages


def _transnet_block(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    parts = []
    for dilation in DILATIONS:
        space, time = (
            weights[f"{name}.Conv3D_{dilation}.layers.{place}.weight"].float() for place in (0, 1)
        )
        frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), space[:, :, 0], padding=1)
        y = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        padded = F.pad(y, (0, 0, 0, 0, dilation, dilation))
        shifted = [padded[:, :, k * dilation : k * dilation + x.shape[2]] for k in range(3)]
        parts.append(
            torch.stack(
                [
                    torch.einsum("ncthw,dc->ndthw", s, time[:, :, k, 0, 0])
                    for k, s in enumerate(shifted)
                ]
            ).sum(0)
        )
    return _normed(torch.cat(parts, dim=1), weights, f"{name}.bn", 1e-3)
