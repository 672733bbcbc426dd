"""A small transformer, and objectives that are taken off it after each test."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from alignlab import Alignment, attach
from alignlab.training.own_clips import Place
from attached_objectives import Attach, Colours


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )


@pytest.fixture
def attached(transformer: WanTransformer3DModel) -> Iterator[Attach]:
    """`attached(repa=REPA, references=...)` with the teacher `mine`."""
    made: list[Alignment] = []

    def attaching(
        teacher: Any = None,
        references: Place | None = None,
        total_steps: int | None = None,
        **objectives: Any,
    ) -> Alignment:
        teachers = {"mine": teacher or Colours()}
        made.append(
            attach(
                transformer,
                objectives=objectives,
                teachers=teachers,
                references=references,
                total_steps=total_steps,
            )
        )
        return made[-1]

    yield attaching
    for alignment in made:
        alignment.taps.__exit__(None, None, None)
