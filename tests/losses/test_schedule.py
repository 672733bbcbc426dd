"""What each schedule does to a weight, and which settings it refuses."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from alignlab.losses.schedule import PlateauWatch, Schedule, StopAtPlateau, warmup_at, weight_at

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
        ("exponential", "'constant', 'linear', 'cosine', 'stop_at', 'stop_at_plateau'"),
        ("stop_at", "step\n  Field required"),
        ({"kind": "constant", "step": 3}, "step\n  Extra inputs"),
        ({"kind": "stop_at", "step": 3, "final": 0.5}, "final\n  Extra inputs"),
        ({"kind": "linear", "end": 9, "step": 3}, "step\n  Extra inputs"),
        ({"kind": "linear", "start": 9, "end": 9}, "must be after start"),
        ({"kind": "cosine", "final": -0.1}, "greater than or equal to 0"),
        ({"kind": "stop_at_plateau", "step": 3}, "step\n  Extra inputs"),
        ({"kind": "stop_at_plateau", "decay": 1.0}, "decay\n  Input should be less than 1"),
        ({"kind": "stop_at_plateau", "patience": 0}, "patience\n  Input should be greater"),
        ({"kind": "stop_at_plateau", "min_delta": math.inf}, "min_delta\n  Input should be a fin"),
        ({"kind": "stop_at_plateau", "start": -1}, "start\n  Input should be greater"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(written: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PARSE.validate_python(written)


def test_a_warmup_counts_its_first_step_and_ends_at_1() -> None:
    assert [warmup_at(4, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [warmup_at(1, step) for step in (0, 1)] == [1.0, 1.0]
    assert [warmup_at(0, step) for step in (0, 10**6)] == [1.0, 1.0]


def watch(**settings: Any) -> PlateauWatch:
    return PlateauWatch(StopAtPlateau(kind="stop_at_plateau", **settings))


def show(watch: PlateauWatch, step: int, value: float) -> None:
    watch.see(step, torch.tensor(value, dtype=torch.float64), torch.tensor(True))


def stopped_after(watch: PlateauWatch, values: list[float]) -> int | None:
    """The number of values after which it stops."""
    for step, value in enumerate(values):
        show(watch, step, value)
        if watch.stopped:
            return step + 1
    return None


def test_a_plateau_stops_the_weight_for_good() -> None:
    schedule = PARSE.validate_python("stop_at_plateau")
    assert schedule == StopAtPlateau(
        kind="stop_at_plateau", decay=0.99, patience=500, min_delta=1e-3, start=0
    )
    assert weight_at(schedule, 9) == 1.0
    assert weight_at(schedule, 9, stopped=True) == 0.0
    seen = watch(decay=0.0, patience=2)
    assert stopped_after(seen, [0.1, 0.2, 0.2, 0.2]) == 4
    before = {name: value.clone() for name, value in seen.state_dict().items()}
    show(seen, 4, 0.9)
    assert seen.stopped
    assert all(torch.equal(value, before[name]) for name, value in seen.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "values", "stop"),
    [
        ({"decay": 0.0, "patience": 3}, [0.1, 0.2, 0.15, 0.18, 0.21, 0.2, 0.2, 0.2], 8),
        ({"decay": 0.0, "patience": 3}, [0.1 * i for i in range(9)], None),
        ({"decay": 0.0, "patience": 2, "min_delta": 0.15}, [0.1 * i for i in range(9)], None),
        ({"decay": 0.0, "patience": 2, "min_delta": 0.25}, [0.1 * i for i in range(9)], 3),
        ({"decay": 0.0, "patience": 2, "min_delta": 0.0}, [-0.9, -0.8, -0.8, -0.8], 4),
        ({"decay": 0.0, "patience": 2, "start": 3}, [0.9, 0.8, 0.7, 0.1, 0.2, 0.2, 0.2], 7),
        # the average 0, .5, .25, .625 rises once more where the values themselves do not
        ({"decay": 0.5, "patience": 2}, [0.0, 1.0, 0.0, 1.0, 1.0, 1.0], None),
        ({"decay": 0.0, "patience": 2}, [0.0, 1.0, 0.0, 1.0, 1.0, 1.0], 4),
    ],
)
def test_when_a_plateau_is_reached(
    settings: dict[str, Any], values: list[float], stop: int | None
) -> None:
    assert stopped_after(watch(**settings), values) == stop


def test_the_average_is_exponential_and_begins_at_the_first_value() -> None:
    seen, expected = watch(decay=0.9, start=1), 0.3
    for step, value in enumerate([9.0, 0.3, 0.8, -0.2]):
        show(seen, step, value)
        if step > 1:
            expected = 0.9 * expected + 0.1 * value
    assert float(seen.average) == pytest.approx(expected, rel=1e-14)


def test_a_watch_goes_on_from_its_saved_state() -> None:
    values = [math.sin(i) + 0.1 * i for i in range(30)] + [2.0] * 40
    whole = watch(decay=0.8, patience=9)
    stop = stopped_after(whole, values)
    assert stop is not None and stop > 20
    first, second = watch(decay=0.8, patience=9), watch(decay=0.8, patience=9)
    for step in range(stop - 5):
        show(first, step, values[step])
    second.load_state_dict(first.state_dict())
    for step in range(stop - 5, stop):
        assert not second.stopped
        show(second, step, values[step])
    assert second.stopped
    assert set(whole.state_dict()) == {"average", "best", "waited"}
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
        assert value.dtype == (torch.int64 if name == "waited" else torch.float64)


def test_the_host_looks_at_a_watch_only_where_it_may_have_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[int] = []
    read = torch.Tensor.__int__

    def noted(value: torch.Tensor) -> int:
        looks.append(step)
        return read(value)

    monkeypatch.setattr(torch.Tensor, "__int__", noted)
    seen = watch(decay=0.0, patience=10)
    for step in range(40):  # best at step 4, and at step 12
        assert not seen.stopped or step >= 23
        show(seen, step, {0: 0.1, 4: 0.2, 12: 0.3}.get(step, 0.0))
    assert looks == [10, 15, 23]
