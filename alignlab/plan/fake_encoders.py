"""What autoencoder and text encoder cost, on fake tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from alignlab.config.run import RunConfig
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_clips import latents_shape
from alignlab.plan.fake_models import CPU, FakeParts
from alignlab.plan.fake_step import tensors_of
from alignlab.plan.fake_values import fake_values
from alignlab.plan.flops import FlopCounter
from alignlab.plan.live_memory import LiveMemory


@dataclass(frozen=True)
class Work:
    """One use of a frozen model.

    Args:
        flops: of it.
        memory: bytes at its peak besides the weights.
    """

    flops: int
    memory: int


@dataclass(frozen=True)
class TextCosts:
    """What the text encoder costs.

    Args:
        weights: bytes of them.
        caption: encodes one.
        numbers: of an embedding.
    """

    weights: int
    caption: Work
    numbers: int


@dataclass(frozen=True)
class EncoderCosts:
    """What the frozen encoders cost.

    Args:
        vae: bytes of its weights.
        text: of captions.
        clip: encodes a clip.
        reference: encodes a reference.
        decode: makes a clip of latents.
        latents, references: numbers of the latents of a clip, and of all its references.
    """

    vae: int
    text: TextCosts
    clip: Work
    reference: Work
    decode: Work
    latents: int
    references: int


def encoder_costs(config: RunConfig, architectures: Architectures) -> EncoderCosts:
    """Encodes and decodes a clip of a run, its references and its caption.

    Raises:
        UserError: settings of the models are nowhere, or damaged.
    """
    folder = architectures.pipeline(config.model.path)
    dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
    parts, (height, width) = FakeParts(folder, dtype, CPU), config.data.size
    shape = latents_shape(parts, config)
    with fake_values(), torch.no_grad():
        vae = parts.vae
        video_THWC = torch.zeros(config.data.frames, height, width, 3, dtype=torch.uint8)
        return EncoderCosts(
            vae=weights_bytes(vae),
            text=text_costs(parts),
            clip=_work(vae, lambda: parts.encode_video(video_THWC)),
            reference=_work(vae, lambda: parts.encode_image(video_THWC[0])),
            decode=_work(vae, lambda: vae.decode(torch.zeros(1, *shape), return_dict=False)),
            latents=shape[0] * shape[1] * shape[2] * shape[3],
            references=config.data.references[1] * shape[0] * shape[2] * shape[3],
        )


def text_costs(parts: FakeParts) -> TextCosts:
    """Encodes a caption. Call it within `fake_values`, without gradients.

    Raises:
        UserError: settings of the text encoder are nowhere, or damaged.
    """
    text = parts.text_model()
    ids_BL = torch.zeros(1, parts.max_tokens, dtype=torch.int64)
    return TextCosts(
        weights_bytes(text),
        _work(text, lambda: text(ids_BL, torch.ones_like(ids_BL))),
        parts.max_tokens * parts.text.dim,
    )


def weights_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    live = LiveMemory()
    live.hold("weights", tensors_of(module))
    return live.live()


def _work(model: nn.Module, work: Callable[[], object]) -> Work:
    live, counter = LiveMemory(), FlopCounter()
    live.hold("weights", tensors_of(model))
    weights = live.live()
    with live, counter:
        work()
    return Work(counter.total, live.peak().total - weights)
