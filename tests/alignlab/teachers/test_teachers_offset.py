"""DINOv2's position embeddings at other sizes than the trained one, as Meta's code has them."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from alignlab.teachers.positions import position_fitter
from meta_dinov2 import with_meta_positions

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 14, "image_size": 56}
# `interpolate_pos_encoding` of facebookresearch/dinov2 (commit b8931f7, interpolate_offset 0.1) of
# a 4x4 table sin(0), sin(1), ... of width 2, class token first, for images of 42x70 pixels
OF_META = [
    [0.0, 0.841471, 0.828557, 0.035264, -0.369332, -0.720846, -0.688113, -0.164206],
    [0.167928, 0.732, 0.860154, 0.222537, -0.973737, -0.79194, -0.234171, 0.48805],
    [0.680827, 0.683542, 0.489559, -0.299324, -0.834675, -0.857749, 0.365446, 0.869262],
    [0.597214, 0.090549, -0.158061, -0.630453, -0.707311, -0.31522, 0.178955, 0.776366],
]


def _embeddings(model: Any, height: int, width: int) -> Tensor:
    """What the model adds to the tokens of an image of this size."""
    tokens = torch.zeros(1, 1 + height // 14 * (width // 14), model.config.hidden_size)
    found: Tensor = model.embeddings.interpolate_pos_encoding(tokens, height, width)
    return found.detach()


def _model() -> Dinov2Model:
    model = Dinov2Model(Dinov2Config(hidden_size=2, **SIZES))
    table = model.embeddings.position_embeddings
    with torch.no_grad():
        table.copy_(torch.arange(table.numel()).view(table.shape).sin())
    return model


def test_positions_at_another_size_are_those_of_metas_code() -> None:
    model = _model()
    expected = torch.tensor(OF_META).flatten().view(1, 16, 2)
    plain = _embeddings(model, 42, 70)
    fit = position_fitter(model, "offset")
    fit((1, 3, 5))
    torch.testing.assert_close(_embeddings(model, 42, 70), expected, rtol=0, atol=2e-6)
    assert (plain - expected).abs().max() > 0.01  # transformers' own are others
    by_formula = _embeddings(with_meta_positions(_model()), 42, 70)
    torch.testing.assert_close(by_formula, expected, rtol=0, atol=2e-6)


def test_positions_at_the_trained_size_are_the_tables_own() -> None:
    model = _model()
    fit = position_fitter(model, "offset")
    fit((1, 3, 5))
    fit((2, 4, 4))
    assert torch.equal(_embeddings(model, 56, 56), model.embeddings.position_embeddings)


def test_positions_of_a_model_with_registers_are_left_to_transformers() -> None:
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=2, **SIZES))
    fit = position_fitter(model, "offset")
    before = _embeddings(model, 42, 70)
    fit((1, 3, 5))
    assert torch.equal(_embeddings(model, 42, 70), before)
    table = model.embeddings.position_embeddings[:, 1:].reshape(1, 4, 4, 2).permute(0, 3, 1, 2)
    metas = torch.nn.functional.interpolate(table, (3, 5), mode="bicubic", antialias=True)
    torch.testing.assert_close(before[:, 1:], metas.flatten(2).mT.detach())
