"""What each gate gives over noise levels, and which settings it refuses."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from alignlab.losses.gate import Gate, gate_weights

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
    ],
)
def test_weights_over_noise_levels(written: object, weights: list[float]) -> None:
    have = gate_weights(PARSE.validate_python(written), LEVELS)
    assert have.dtype == LEVELS.dtype
    assert have.tolist() == pytest.approx(weights)


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
        ("t^", "unknown gate 't\\^': choose none, t\\^p"),
        ("exp(t)", "unknown gate"),
        ("window", "unknown gate"),
        ("t^0", "greater than 0"),
        ({"kind": "power"}, "p\n  Field required"),
        ({"kind": "none", "p": 3}, "p\n  Extra inputs"),
        ({"kind": "window", "low": 0.5, "high": 0.5}, "must be below high"),
        ({"kind": "window", "low": 0.5, "high": 500}, "less than or equal to 1"),
        ({"kind": "step"}, "'none', 'power', 'inverse_power', 'window'"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(written: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PARSE.validate_python(written)
