"""What each gate gives over noise levels, and which settings it refuses."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from alignlab.losses.gate import Gate, gate_weights, is_normalized, mean_weight
from alignlab.losses.repa import repa_loss
from authors_values import stored_numbers, wave

PARSE: TypeAdapter[Gate] = TypeAdapter(Gate)
LEVELS = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("written", "weights"),
    [
        ("none", [1, 1, 1, 1, 1]),
        ({"kind": "none"}, [1, 1, 1, 1, 1]),
        ("t^3", [0, 0.015625, 0.125, 0.421875, 1]),
        ({"kind": "power", "p": 3}, [0, 0.015625, 0.125, 0.421875, 1]),
        ("(1-t)^3", [1, 0.421875, 0.125, 0.015625, 0]),
        ("(1 - t)^0.5", [1, 0.8660254037844386, 0.7071067811865476, 0.5, 0]),
        ({"kind": "inverse_power", "p": 3}, [1, 0.421875, 0.125, 0.015625, 0]),
        ({"kind": "window", "low": 0.25, "high": 0.75}, [0, 1, 1, 1, 0]),
        ("snr", [1, 0.98, 0.8448275862068965, 0.3769230769230769, 0]),
        ({"kind": "snr", "tau": 0.5}, [1, 0.9, 0.5, 0.1, 0]),
        ("sigmoid", [1, 1 / (1 + math.exp(-9)), 1 / (1 + math.exp(-4)), 1 / (1 + math.e), 0.00247]),
    ],
)
def test_weights_over_noise_levels(written: object, weights: list[float]) -> None:
    have = gate_weights(PARSE.validate_python(written), LEVELS)
    assert have.dtype == LEVELS.dtype
    assert have.tolist() == pytest.approx(weights, abs=5e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sigmoid", {}),
        ("sigmoid_tau_0.5_k_10", {"tau": 0.5, "k": 10}),
        ("snr", {}),
        ("snr_tau_0.4", {"tau": 0.4}),
    ],
)
def test_weights_are_those_of_stable_velocitys_authors(
    name: str, settings: dict[str, float]
) -> None:
    stored = stored_numbers("stable_velocity")
    levels = torch.tensor(stored["levels"], dtype=torch.float64)
    gate = PARSE.validate_python({"kind": name.split("_")[0], **settings})
    assert gate_weights(gate, levels).tolist() == pytest.approx(stored[name], rel=1e-12, abs=1e-11)


@pytest.mark.parametrize("kind", ["sigmoid", "snr"])
def test_a_normalized_gate_gives_the_loss_of_stable_velocitys_authors(kind: str) -> None:
    stored = stored_numbers("stable_velocity")
    levels_B = torch.tensor(stored["loss_levels"], dtype=torch.float64)
    loss_B = repa_loss(wave(4, 12, 5, phase=1.0), wave(4, 12, 5, phase=2.0) + 0.7)
    gate = PARSE.validate_python({"kind": kind, "normalize": True})
    loss = (gate_weights(gate, levels_B) / mean_weight(gate, levels_B) * loss_B).mean()
    assert is_normalized(gate) and not is_normalized(PARSE.validate_python(kind))
    assert loss.item() == pytest.approx(stored[f"{kind}_loss"], rel=1e-12)


def test_a_step_whose_weights_are_all_0_is_divided_by_more() -> None:
    gate = PARSE.validate_python({"kind": "window", "low": 0, "high": 0.1, "normalize": True})
    levels = torch.tensor([0.5, 0.9])
    assert (gate_weights(gate, levels) / mean_weight(gate, levels)).tolist() == [0, 0]


def test_mean_of_refaligns_gate_over_its_own_timesteps() -> None:
    uniform = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64)
    shifted = 5 * uniform / (1 + 4 * uniform)
    assert gate_weights(PARSE.validate_python("t^3"), shifted).mean().item() == pytest.approx(
        0.534, abs=1e-3
    )
    assert gate_weights(PARSE.validate_python("(1-t)^3"), shifted).mean().item() == pytest.approx(
        0.08, abs=5e-3
    )


def test_rounding_above_one_is_not_nan() -> None:
    gate = PARSE.validate_python("(1-t)^2.5")
    assert gate_weights(gate, torch.tensor([1.0000001])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("t^", "unknown gate 't\\^': choose none, sigmoid, snr, t\\^p"),
        ({"kind": "none", "normalize": True}, "normalize\n  Extra inputs"),
        ({"kind": "sigmoid", "k": 0}, "k\n  Input should be greater than 0"),
        ({"kind": "snr", "tau": 1}, "tau\n  Input should be less than 1"),
        ("exp(t)", "unknown gate"),
        ("window", "unknown gate"),
        ("t^0", "greater than 0"),
        ({"kind": "power"}, "p\n  Field required"),
        ({"kind": "none", "p": 3}, "p\n  Extra inputs"),
        ({"kind": "window", "low": 0.5, "high": 0.5}, "must be below high"),
        ({"kind": "window", "low": 0.5, "high": 500}, "less than or equal to 1"),
        ({"kind": "step"}, "'none', 'power', 'inverse_power', 'window', 'sig"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(written: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PARSE.validate_python(written)
