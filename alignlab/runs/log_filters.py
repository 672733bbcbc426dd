"""Keeps third-party noise that says nothing about a run off the terminal."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

# Logger -> how the messages begin that are dropped ("" for all).
NOISE = {
    "mlflow.store.db.utils": "",  # migrations, and tracebacks of what it raises anyway
    "urllib3.connectionpool": "Retrying",  # of MLflow's client, whose failure is told
    "diffusers.models.modeling_utils": "Attention backends are an experimental feature",
}
# bf16 autocast over fp32 weights: torch says once that it cannot fuse the norm.
AUTOCAST_NORM = "Mismatch dtype between input and weight"
# Of Wan's forward under fully_shard: nothing here changes its output in place.
VIEW_OF_SHARDED = "FSDP2-wrapped module"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences progress bars of model loading and the messages of `NOISE`, for a while.

    Everything is as it was afterwards. Also a decorator.
    """
    with ExitStack() as stack:
        for bars in (diffusers_logging, transformers_logging):
            if bars.is_progress_bar_enabled():
                bars.disable_progress_bar()
                stack.callback(bars.enable_progress_bar)
        for name, beginning in NOISE.items():
            noise_filter = _Drop(beginning)
            logging.getLogger(name).addFilter(noise_filter)
            stack.callback(logging.getLogger(name).removeFilter, noise_filter)
        stack.enter_context(warnings.catch_warnings())
        for message in (AUTOCAST_NORM, VIEW_OF_SHARDED):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


class _Drop(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)
