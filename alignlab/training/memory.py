"""Peak memory of a run."""

import re
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

MIB = 1024**2


class PeakMemory:
    """Peak since it was entered: allocated CUDA memory, or on a CPU the process's resident set.

    The resident set includes the interpreter, libraries and cached clips; it compares runs of one
    process only roughly. Where the system does not let the peak be reset (not Linux), it is the
    peak since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif (reset := Path("/proc/self/clear_refs")).exists():
            reset.write_text("5")
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def peak_mib(self) -> float:
        """The peak so far, in MiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / MIB
        status = Path("/proc/self/status")
        if status.exists():
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            if found:
                return int(found[1]) / 1024
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / MIB if sys.platform == "darwin" else peak / 1024
