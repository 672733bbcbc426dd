"""The batches on which the contract is checked: small, with references or frames that differ.

Shape letters: B batch, T frames (or K references), P tokens per frame, N tokens, L text tokens,
D width, H, W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.losses.objective import LATENTS, Context, Features, Tokens, self_key

TEACHER_DIMS = {"dino": 5, "clip": 7}
"""Width of the features of each teacher that a case may name."""
TEACHER_SIZES = {"dino": 2, "clip": 4}
"""Side of each teacher's patch grid; the student's is 2."""
LATENTS_DIM = 4
"""Width of a token's patch of clean latents."""
STUDENT_DIM, STUDENT_FRAMES, TEACHER_FRAMES = 6, 3, 5
BLOCKS = (0, 1, 2)
STUDENT_HEADS, TEACHER_HEADS = 2, {"dino": (2, 2), "clip": (3,)}
"""Where attention maps are read: heads of the student, and of each layer of a teacher."""
HEAD_WIDTH = 3
"""Channels of a head, of all of them."""
TEXT_TOKENS, TEXT_DIM, MASK_SIZE = 6, 4, 8


@dataclass(frozen=True)
class OneSample:
    """One clip: tokens (T, P, D) by block and by teacher, and its context.

    Among the teachers are the clean latents and the student's average. T counts the student's or
    the teacher's video frames, or the references. With `is_attention` tokens of the student and of
    vision models are queries and keys.
    """

    student: dict[int, Tensor]
    teacher: dict[str, Tensor]
    text_LD: Tensor
    mask_THW: Tensor
    is_attention: bool = False


def draw_samples(tokens: str, *, attention: bool = False) -> list[OneSample]:
    """Draws four samples; with `reference` tokens, they have 3, 1, 0 and 2 references."""
    rng = torch.Generator().manual_seed(0)
    student_dim, teacher_dims = STUDENT_DIM, TEACHER_DIMS
    if attention:
        student_dim = 2 * STUDENT_HEADS * HEAD_WIDTH
        teacher_dims = {a: 2 * sum(heads) * HEAD_WIDTH for a, heads in TEACHER_HEADS.items()}
    drawn = []
    for count in (3, 1, 0, 2):
        frames = count if tokens == "reference" else STUDENT_FRAMES
        teacher_frames = count if tokens == "reference" else TEACHER_FRAMES
        student = {block: torch.randn(frames, 4, student_dim, generator=rng) for block in BLOCKS}
        teacher = {
            alias: torch.randn(
                teacher_frames, TEACHER_SIZES[alias] ** 2, teacher_dims[alias], generator=rng
            )
            for alias in TEACHER_DIMS
        }
        # Later draws, so that tokens are the same whatever is added here.
        text = torch.randn(TEXT_TOKENS, TEXT_DIM, generator=rng)
        text[3 + count % 3 :] = 0.0
        mask = torch.rand(TEACHER_FRAMES, MASK_SIZE, MASK_SIZE, generator=rng) < 0.2 + 0.1 * count
        teacher[LATENTS] = torch.randn(frames, 4, LATENTS_DIM, generator=rng)
        for block in BLOCKS:
            teacher[self_key(block)] = torch.randn(frames, 4, STUDENT_DIM, generator=rng)
        drawn.append(OneSample(student, teacher, text, mask, attention))
    return drawn


def collate(
    samples: Sequence[OneSample],
) -> tuple[dict[int, Tokens], dict[str, Features], Context]:
    """Makes what `Objective.forward` takes, of samples with different numbers of references."""
    counts = torch.tensor([len(sample.student[0]) for sample in samples])
    frames, is_attention = int(counts.max()), samples[0].is_attention
    # Rising ids for the references that a sample has, -1 for the others; each covers 4 tokens.
    ids_BK = torch.arange(frames).expand(len(samples), frames)
    ids_BN = ids_BK.where(ids_BK < counts[:, None], -1).repeat_interleave(4, dim=1)
    student = {
        block: Tokens(
            _padded([sample.student[block] for sample in samples]).flatten(1, 2),
            (frames, 2, 2),
            ids_BN,
            heads=STUDENT_HEADS if is_attention else None,
        )
        for block in BLOCKS
    }
    teacher = {}
    own = {LATENTS: 2, **{self_key(block): 2 for block in BLOCKS}}
    for alias, size in {**TEACHER_SIZES, **own}.items():
        tokens_BTPD = _padded([sample.teacher[alias] for sample in samples])
        heads = TEACHER_HEADS.get(alias, ()) if is_attention else ()
        teacher[alias] = Features(tokens_BTPD, (tokens_BTPD.shape[1], size, size), heads)
    text_BLD = torch.stack([sample.text_LD for sample in samples])
    masks_BTHW = torch.stack([sample.mask_THW for sample in samples])
    # The first two tokens of each reference show its subject.
    foreground_BN = torch.tensor([0.9, 0.6, 0.3, 0.0]).repeat(frames) * (ids_BN >= 0)
    return student, teacher, Context(text_BLD, masks_BTHW, foreground_BN)


def _padded(tokens: list[Tensor]) -> Tensor:
    """Stacks (T, P, D) of different T, filling the rest with numbers that must not matter."""
    frames = max(len(x) for x in tokens)
    filled = [x.new_full((frames, *x.shape[1:]), 1e3) for x in tokens]
    for whole, x in zip(filled, tokens, strict=True):
        whole[: len(x)] = x
    return torch.stack(filled)
