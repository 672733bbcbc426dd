"""RefAlign's released training step and sampler against ours, dropped references included.

What is expected was computed by the authors' code (`tests/authors_values`), in float32.
"""

import math
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from alignlab.config.parts import FlowConfig
from alignlab.losses.gate import PowerGate, gate_weights
from alignlab.losses.objective import Features
from alignlab.losses.refalign import RefAlign, RefAlignConfig
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.sampling import Guidance, sample_latents
from alignlab.training.flow_matching import (
    FlowWeights,
    flow_loss,
    interpolate,
    shifted,
    train_levels,
)
from authors_values import fill_with_waves, stored_numbers, stored_tensors, wave

TENSORS, NUMBERS = stored_tensors("refalign"), stored_numbers("refalign")
FRAMES, SIZE, PATCHES = 2, (4, 6), 6
BLOCKS = (0, 1, 2)  # of the first nine, all that the small transformer has
TEXT, NEGATIVE = wave(8, 16, phase=1.0).float(), wave(8, 16, phase=2.0).float()
REFERENCES = wave(2, 16, *SIZE, phase=3.0).float()
TEACHER = wave(2, PATCHES, 1024, phase=4.0).float()
CLEAN = wave(1, 16, FRAMES, *SIZE, phase=5.0).float()
NOISE = wave(1, 16, FRAMES, *SIZE, phase=6.0).float()


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=32,
    )
    fill_with_waves(model)
    return model


@pytest.fixture(scope="module")
def objective() -> RefAlign:
    made = RefAlign(
        RefAlignConfig(teacher="dino", blocks=BLOCKS), student_dim=24, teacher_dims={"dino": 1024}
    )
    for block in BLOCKS:
        layers = made.projectors[f"block_{block}"]
        assert isinstance(layers, nn.Sequential)
        for place in (0, 2):
            weight = layers[place].weight
            assert isinstance(weight, Tensor)
            values = wave(*weight.shape, phase=10.0 * block + place) / math.sqrt(weight.shape[1])
            with torch.no_grad():
                weight.copy_(values)
    return made


def norm_of_gradients(module: nn.Module) -> float:
    squares = [p.grad.double().square().sum() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("count", [2, 1, 0])
def test_a_training_step_is_refaligns(
    transformer: WanTransformer3DModel, objective: RefAlign, count: int
) -> None:
    expected: dict[str, Any] = NUMBERS["training"][str(count)]
    sigma_B = torch.tensor([expected["sigma"]])
    transformer.zero_grad()
    objective.zero_grad()
    with ReferenceBranch(transformer, absent_references="zero", blocks=BLOCKS) as branch:
        noisy = interpolate(CLEAN, NOISE, sigma_B)
        out = branch(noisy, sigma_B * 1000, TEXT[None], [REFERENCES[:count]])
    velocity = out.velocity_BCTHW[0]
    torch.testing.assert_close(velocity, TENSORS[f"velocity_{count}"], rtol=1e-5, atol=1e-5)
    if count:
        tokens = out.taps[2].reference.tokens_BND[0]
        torch.testing.assert_close(tokens, TENSORS[f"tokens_{count}"], rtol=1e-5, atol=1e-5)

    grid = out.taps[0].reference.grid
    assert grid == (count, 2, 3)
    terms = objective(
        {block: out.taps[block].reference for block in BLOCKS},
        {"dino": Features(TEACHER[None, :count], grid)},
    )
    flow_B = FlowWeights(FlowConfig(weighting="wan_gaussian"))(sigma_B) * flow_loss(
        out.velocity_BCTHW, CLEAN, NOISE
    )
    gate_B = gate_weights(PowerGate(kind="power", p=3), sigma_B)
    assert flow_B.item() == pytest.approx(expected["flow"], rel=1e-5)
    assert (gate_B * terms.loss_B).item() == pytest.approx(expected["alignment"], rel=1e-5)
    push = (gate_B * terms.parts["push"]).item()
    assert push == pytest.approx(expected["push_gated"], rel=1e-5, abs=1e-7)
    torch.autograd.backward((flow_B + gate_B * terms.loss_B).sum())
    assert norm_of_gradients(transformer) == pytest.approx(expected["gradient_norm"], rel=1e-5)
    projected = norm_of_gradients(objective)
    assert projected == pytest.approx(expected["projector_gradient_norm"], rel=1e-5)


@pytest.mark.parametrize("count", [2, 0])
def test_the_sampler_is_refaligns(transformer: WanTransformer3DModel, count: int) -> None:
    """As many latents of zeros as references in the unconditional branch, without any: one."""
    guidance = Guidance(steps=3, shift=5.0, text=7.5, reference=5.0)
    expected = TENSORS[f"sampled_{count}"]
    found = {}
    for absent in ("zero", "none"):
        with ReferenceBranch(transformer, absent_references=absent) as branch:
            found[absent] = sample_latents(
                branch, NOISE[0], TEXT, NEGATIVE, REFERENCES[:count], guidance
            )
    largest = float(expected.abs().max())
    torch.testing.assert_close(found["zero"], expected, rtol=1e-5, atol=1e-5 * largest)
    assert (found["none"] - expected).norm() > 0.05 * expected.norm()


def test_noise_levels_weights_and_gate_are_refaligns() -> None:
    levels = NUMBERS["levels"]
    sigma = torch.tensor(levels["sigma"], dtype=torch.float64)
    ours = train_levels(FlowConfig()).flip(0)[levels["index"]]
    torch.testing.assert_close(ours, sigma, rtol=1e-6, atol=0)
    weights = FlowWeights(FlowConfig(weighting="wan_gaussian"))(ours)
    torch.testing.assert_close(weights, torch.tensor(levels["weight"]).double(), rtol=1e-4, atol=0)
    gate = gate_weights(PowerGate(kind="power", p=3), ours)
    torch.testing.assert_close(gate, torch.tensor(levels["gate"]).double(), rtol=1e-4, atol=0)
    steps = shifted(torch.linspace(1, 0, 51, dtype=torch.float64), 5.0)[:-1]
    given = torch.tensor(NUMBERS["sampler_sigmas_50"], dtype=torch.float64)
    torch.testing.assert_close(steps, given, rtol=0, atol=1e-7)
