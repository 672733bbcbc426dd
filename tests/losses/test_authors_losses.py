"""VideoREPA's three losses, REPA and iREPA against what the authors' code gave."""

import pytest
import torch
from torch import nn

from alignlab.losses.irepa import irepa_loss
from alignlab.losses.objective import Features, Tokens
from alignlab.losses.repa import repa_loss, spatial_zscore
from alignlab.losses.videorepa import VideoRepa, VideoRepaConfig
from authors_values import stored_numbers, wave


def test_videorepas_loss_on_its_own_grids() -> None:
    """From the projected tokens on: frames doubled, 3x3 tokens pooled, all relations compared."""
    expected = stored_numbers("videorepa")
    width = 8
    config = VideoRepaConfig(teacher="video", blocks=(0,), pool=3)
    objective = VideoRepa(config, student_dim=width, teacher_dims={"video": width}).double()
    identity = nn.Linear(width, width, bias=False).double()
    pool = objective.pools["block_0"]
    assert isinstance(pool, nn.Conv2d) and pool.bias is not None
    with torch.no_grad():
        identity.weight.copy_(torch.eye(width))
        pool.weight.copy_(wave(width, width, 3, 3, phase=3.0) / 9)
        pool.bias.copy_(wave(width, phase=4.0) * 0.1)
    objective.projectors["block_0"] = identity
    first = wave(1, 1, 30, 45, width, phase=9.0)  # that nothing is compared with
    frames = torch.cat([first, wave(1, 12, 30, 45, width, phase=1.0)], dim=1)
    teacher = Features(wave(1, 24, 150, width, phase=2.0), (24, 10, 15))
    with torch.no_grad():
        terms = objective({0: Tokens(frames.flatten(1, 3), (13, 30, 45))}, {"video": teacher})
    assert terms.loss_B.item() == pytest.approx(expected["joint"], rel=1e-9)
    assert terms.parts["spatial"].item() == pytest.approx(expected["spatial"], rel=1e-9)
    assert terms.parts["temporal"].item() == pytest.approx(expected["temporal"], rel=1e-9)


def test_videorepas_projector_starts_as_widely_as_the_authors() -> None:
    objective = VideoRepa(
        VideoRepaConfig(teacher="video"), student_dim=512, teacher_dims={"video": 256}
    )
    layers = [
        layer
        for layer in objective.projectors["block_17"].modules()
        if isinstance(layer, nn.Linear)
    ]
    for layer, expected in zip(layers, stored_numbers("videorepa")["projector"], strict=True):
        assert layer.in_features == expected["inputs"]
        assert layer.weight.std().item() == pytest.approx(expected["weight_std"], rel=0.01)
        assert layer.bias.std().item() == pytest.approx(expected["bias_std"], rel=0.1)


def test_repa_and_irepa() -> None:
    expected = stored_numbers("irepa")
    student, teacher = wave(2, 12, 5, phase=1.0), wave(2, 12, 5, phase=2.0) + 0.7
    first = torch.tensor(expected["zscore_first_token"], dtype=torch.float64)
    torch.testing.assert_close(spatial_zscore(teacher, gamma=0.6)[0, 0], first)
    loss = irepa_loss(student[:, None], teacher[:, None]).mean()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert repa_loss(student, teacher).mean().item() == pytest.approx(
        expected["repa_loss"], rel=1e-9
    )
