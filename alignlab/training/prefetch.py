"""Makes the micro-batches of the next steps while a step runs.

Threads decode, encode what is not cached, draw and stack, all on the CPU; the thread that trains
copies to its device what it takes. Everything that is drawn has an address (`training_batch`), so
that nothing depends on who makes it, and when.

What torch keeps by thread is as in the thread that trains, or does not matter: the number of
threads of an operation is set, for it changes last bits; autocast is off where batches are made, in
either thread, and encoders keep no gradients.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

from alignlab.config.parts import TrainingConfig
from alignlab.models.model_files import NotLoadedError, load_nothing_here
from alignlab.training.micro_batches import MicroBatches

THREAD_NAME = "alignlab-prefetch"
AHEAD = 2

Made = TypeVar("Made")

_thread = threading.local()


class UnwantedError(Exception):
    """What a thread makes will not be taken: the training is over."""


def check_wanted() -> None:
    """Ends a thread's work if the training is over; what makes several clips calls it before each.

    Raises:
        UnwantedError: it is.
    """
    is_over = getattr(_thread, "is_over", None)
    if is_over is not None and is_over.is_set():
        raise UnwantedError


class Prefetch(Generic[Made]):
    """Gives the micro-batches of one step after the other; threads make them ahead.

    The first one is made by the thread that takes it, and so is one for which a model has to be
    loaded: with the cache warm no model is, and where models are, the threads stand still. An error
    of a thread is raised where its micro-batch is taken. Leaving the context ends the threads:
    what is in the making is finished at most as far as the clip that is being encoded.

    Args:
        micro_batches: gives those of a step; called by the thread that takes them, some steps
            early.
        first: step that is taken, from 0; the others follow it. Nothing is made beyond the last.
        config: of the training; read are `steps`, `data.workers` and `data.prefetch`.
        device: where the training computes.
    """

    def __init__(
        self,
        micro_batches: Callable[[int], MicroBatches[Made]],
        first: int,
        config: TrainingConfig,
        device: torch.device,
    ) -> None:
        workers = config.data.workers
        self._ahead = config.data.prefetch or max(AHEAD, workers)
        self._micro_batches = micro_batches
        self._makers = self._of_all(range(first, config.steps))
        self._is_begun = False
        self._made: deque[tuple[Callable[[], Made], Future[Made]]] = deque()
        self._is_over = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        if workers:
            begin = (self._is_over, torch.get_num_threads(), device)
            self._pool = ThreadPoolExecutor(workers, THREAD_NAME, _begin_thread, begin)

    def take(self, step: int) -> MicroBatches[Made]:
        """Those of a step; of each step once, and each of them once."""
        batches = self._micro_batches(step)
        if self._pool is None:
            return batches
        return batches.made_by([self._next] * len(batches))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is made inside: what has begun is waited for, and more begins with a take."""
        wait([future for _, future in self._made])
        yield

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._made.clear()

    def _of_all(self, steps: range) -> Iterator[Callable[[], Made]]:
        for step in steps:
            yield from self._micro_batches(step).makers_ahead()

    def _next(self) -> Made:
        if not self._is_begun:
            self._is_begun = True
            made = next(self._makers)()
            self._fill()
            return made
        make, future = self._made.popleft()
        self._fill()
        try:
            return future.result()
        except NotLoadedError:
            with self.paused():
                return make()

    def _fill(self) -> None:
        """Has as many made as may be ahead."""
        assert self._pool is not None
        while len(self._made) < self._ahead and (make := next(self._makers, None)) is not None:
            self._made.append((make, self._pool.submit(make)))


def _begin_thread(is_over: threading.Event, num_threads: int, device: torch.device) -> None:
    """What holds in a thread for as long as it lives."""
    _thread.is_over = is_over
    load_nothing_here()
    torch.set_num_threads(num_threads)
    # encoders leave autocast, and its outermost end, by thread, empties a cache of cast weights
    # that all threads share: gradients of a weight that is used twice would then round otherwise
    torch.autocast_increment_nesting()
    if device.type == "cuda":
        torch.cuda.set_device(device)
