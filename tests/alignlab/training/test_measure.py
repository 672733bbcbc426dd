"""What a training costs, without what is done between its steps."""

from pathlib import Path

import pytest
import torch

from alignlab.training.measure import PeakMemory, StepClock
from alignlab.training.micro_batches import MicroBatches
from alignlab.units import MIB


def use(mib: int) -> None:
    torch.ones(mib * MIB // 4)  # float32, given back at once


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak can be reset")
def test_memory_of_a_pause_is_no_part_of_the_peak() -> None:
    memory = PeakMemory(torch.device("cpu"))
    use(100)
    before = memory.peak_mib()
    with memory.paused():
        use(600)
    assert before <= memory.peak_mib() < before + 100
    use(600)
    assert memory.peak_mib() > before + 300


def test_the_time_of_every_micro_batch_is_the_datas(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("alignlab.training.measure.time.perf_counter", lambda: now[0])

    def make() -> float:
        now[0] += 2
        return now[0]

    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        clock.step_begins()
        for made in MicroBatches([make] * 3).within(clock.making_data):
            assert made == now[0]  # made when it is taken
            now[0] += 5
    assert clock.lap() == {"time/step": 15.0, "time/data": 6.0}
