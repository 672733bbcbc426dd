"""What a recipe says of the machines that its runs are trained on."""

from pydantic import Field

from alignlab.config.data import Settings


class LaunchConfig(Settings):
    """What each run of a comparison or a sweep needs of its machine.

    Ray reserves it. The local launcher refuses a machine that has less for the runs that it trains
    at a time: one, or as many as a sweep has workers.
    """

    cpus: int | None = Field(default=None, ge=1)
    """CPU cores, and threads that torch computes with. Left out: one with Ray; all locally."""
    gpus: float | None = Field(default=None, ge=0, le=1)
    """Of a GPU: a half lets two runs share one. Left out: one where there are any."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Main memory. Left out: it is not looked at."""
