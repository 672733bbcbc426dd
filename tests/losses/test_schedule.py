"""What each schedule does to a weight, and which settings it refuses."""

import pytest
from pydantic import TypeAdapter, ValidationError

from alignlab.losses.schedule import Schedule, weight_at

PARSE: TypeAdapter[Schedule] = TypeAdapter(Schedule)


@pytest.mark.parametrize(
    ("written", "steps", "weights"),
    [
        ("constant", [0, 10**6], [1.0, 1.0]),
        ({"kind": "constant"}, [5], [1.0]),
        (
            {"kind": "linear", "start": 100, "end": 300, "final": 0.2},
            [0, 100, 150, 200, 300, 999],
            [1.0, 1.0, 0.8, 0.6, 0.2, 0.2],
        ),
        (
            {"kind": "cosine", "end": 100},
            [0, 25, 50, 75, 100, 101],
            [1.0, 0.8535533905932737, 0.5, 0.14644660940672624, 0.0, 0.0],
        ),
        ({"kind": "stop_at", "step": 2500}, [0, 2499, 2500, 9999], [1.0, 1.0, 0.0, 0.0]),
    ],
)
def test_weight_over_steps(written: object, steps: list[int], weights: list[float]) -> None:
    schedule = PARSE.validate_python(written)
    assert [weight_at(schedule, step) for step in steps] == pytest.approx(weights)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_ramp_without_an_end_lasts_the_whole_run(kind: str) -> None:
    schedule = PARSE.validate_python(kind)
    assert [weight_at(schedule, step, 40) for step in (0, 20, 40)] == pytest.approx([1, 0.5, 0])
    with pytest.raises(ValueError, match=f"{kind} schedule without `end`"):
        weight_at(schedule, 0)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("exponential", "'constant', 'linear', 'cosine', 'stop_at'"),
        ("stop_at", "step\n  Field required"),
        ({"kind": "constant", "step": 3}, "step\n  Extra inputs"),
        ({"kind": "stop_at", "step": 3, "final": 0.5}, "final\n  Extra inputs"),
        ({"kind": "linear", "end": 9, "step": 3}, "step\n  Extra inputs"),
        ({"kind": "linear", "start": 9, "end": 9}, "must be after start"),
        ({"kind": "cosine", "final": -0.1}, "greater than or equal to 0"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(written: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PARSE.validate_python(written)
