"""When a step holds the most, on one device and where several share a part of it."""

import random

import pytest
import torch

from alignlab.plan.live_memory import LiveMemory

MADE = "made"


def made_and_freed(seed: int) -> tuple[LiveMemory, list[tuple[int, int]]]:
    """Tensors of two labels that come and go, and bytes of both after each event."""
    rng = random.Random(seed)
    live, times = LiveMemory(lambda: MADE), []
    alive: list[tuple[torch.Tensor, bool]] = []
    with live:
        for _ in range(60):
            if alive and rng.random() < 0.45:
                alive.pop(rng.randrange(len(alive)))
            else:
                tensor = torch.empty(rng.randrange(1, 50))
                is_shared = rng.random() < 0.5
                if is_shared:
                    live.hold("shared", [tensor])
                alive.append((tensor, is_shared))
                del tensor
            whole, shared = (
                sum(t.untyped_storage().nbytes() for t, mark in alive if mark == is_shared)
                for is_shared in (False, True)
            )
            times.append((whole, shared))
    return live, times


@pytest.mark.parametrize("seed", range(5))
def test_peaks_hold_however_many_share(seed: int) -> None:
    live, times = made_and_freed(seed)
    peaks = live.peaks(frozenset({"shared"}))
    assert live.peak() == peaks[0] and live.peak().total == max(map(sum, times))
    for devices in (1, 2, 3, 8, 64):
        found = max(
            peak.by_label.get(MADE, 0) + peak.by_label.get("shared", 0) / devices for peak in peaks
        )
        assert found == pytest.approx(max(whole + part / devices for whole, part in times))


def test_what_the_host_holds_is_not_counted_and_copies_of_it_are() -> None:
    host, live = torch.empty(100), LiveMemory()
    live.pass_over([host])
    with live:
        view, copy = host[:50], host.clone()
    assert live.live() == live.peak().total == copy.untyped_storage().nbytes()
    assert view.untyped_storage().data_ptr() == host.untyped_storage().data_ptr()
