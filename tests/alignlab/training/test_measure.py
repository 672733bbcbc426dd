"""What a training costs, without what is done between its steps."""

from pathlib import Path

import pytest
import torch

from alignlab.training.measure import PeakMemory

MIB = 2**20


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
