"""Checkpoints of weights that all ranks agree on, written by rank 0, or by all of them.

Of a transformer in shards every rank writes its part of the weights, their average and the
optimizer's state, and none gathers them. An adapter, which is small, rank 0 gathers and writes as a
run of one process does.

With `checkpoint.asynchronous` a thread writes a copy in main memory while training goes on.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from alignlab import interruption
from alignlab.config.parts import CheckpointConfig
from alignlab.dataset_cache.disk_room import size_text
from alignlab.distributed.ranks import Ranks
from alignlab.distributed.sharding import has_shards, total_norm, whole_tensors
from alignlab.errors import UserError, first_line
from alignlab.runs.atomic_files import whole_folder
from alignlab.runs.checkpoint_folders import (
    OPTIMIZER_SHARDS,
    copy_path,
    prune,
    remove_replaced,
    step_path,
)
from alignlab.runs.kept_checkpoints import keep_weights_of
from alignlab.runs.metric_rows import mark_log
from alignlab.runs.run_folder import RunFolder
from alignlab.training.checkpoint import RunState, TrainState, shards_of
from alignlab.training.sharded_files import write_shards
from alignlab.training.snapshot import Snapshot

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a training, one at a time. Its end waits for the last one.

    Args:
        state: what is written.
        ranks: that train it.
        settings: which older checkpoints are kept, and whether training waits.
    """

    def __init__(self, state: TrainState, ranks: Ranks, settings: CheckpointConfig) -> None:
        is_shared = settings.asynchronous and state.is_in_shards
        self._writers = ranks.apart() if is_shared else ranks  # of the thread
        self._state = state
        self._ranks = ranks
        self._settings = settings
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writing is None:
            return
        with interruption.held():
            wait([self._writing])
        failure = self._writing.exception()
        if failure is None or failure is error:
            return
        if error is None or isinstance(error, KeyboardInterrupt):
            raise failure
        log.warning("a checkpoint could not be written: %s", first_line(failure))

    def save(
        self, folder: RunFolder, *, is_checkpoint: bool = True, weights: bool = False
    ) -> Path | None:
        """Writes a checkpoint, or the weights of a step alone; first waits for the one before.

        All ranks wait until it is written, or with `checkpoint.asynchronous` copied.

        Args:
            folder: of the run; where the state is in shards, all ranks see it.
            is_checkpoint: whether the optimizer's state is among it.
            weights: whether a copy of the weights stays when the checkpoint goes.

        Returns:
            The checkpoint, if it is one.

        Raises:
            UserError: the ranks do not hold the same weights, or another one could not write.
        """
        self.wait()
        state, ranks = self._state, self._ranks
        if ranks.world_size > 1:
            norm = float(total_norm(list(state.names)))
            ranks.check_same("the norm of the trained weights", norm)
        path = (step_path if is_checkpoint else copy_path)(folder.checkpoints, state.step)
        if ranks.is_main or state.is_in_shards:
            mark = mark_log(folder.metrics) if ranks.is_main and is_checkpoint else None
            snapshot = Snapshot.of(state, mark, weights_only=not is_checkpoint)
            if isinstance(state, RunState) and state.is_lora and state.is_in_shards:
                snapshot = _gathered(snapshot, ranks)
            if self._settings.asynchronous:
                self._begin(snapshot.in_main_memory(), path, keeps_weights=weights)
            else:
                self._write(snapshot, path, keeps_weights=weights)
        ranks.barrier()  # here: the group that averages gradients has a shorter timeout
        return path if is_checkpoint else None

    def wait(self) -> None:
        """Waits for the checkpoint that is being written; raises what went wrong."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def has_failed(self) -> bool:
        """Whether one could not be written; nothing is waited for."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def raise_failure(self) -> None:
        """Raises what went wrong on this rank, or that something did on another one."""
        if self.has_failed():
            self.wait()
        raise UserError("another rank could not write its checkpoint, its own message says why")

    def _begin(self, snapshot: Snapshot, path: Path, *, keeps_weights: bool) -> None:
        if self._ranks.is_main:
            whose = "" if self._ranks.world_size == 1 else " by this rank"
            log.info(
                "%s: %s copied to main memory%s, written while training goes on",
                *(path.name, size_text(snapshot.num_bytes), whose),
            )
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._writing = executor.submit(self._write, snapshot, path, keeps_weights=keeps_weights)
        executor.shutdown(wait=False)

    def _write(self, snapshot: Snapshot, path: Path, *, keeps_weights: bool) -> None:
        if snapshot.state.is_in_shards:
            _write_in_shards(snapshot, path, self._writers)
        else:
            with whole_folder(path) as folder:
                snapshot.write(folder)
        if not self._ranks.is_main or snapshot.moments is None:
            return
        if keeps_weights:
            keep_weights_of(path)
        remove_replaced(path.parent, snapshot.step)
        prune(path.parent, self._settings.keep, self._settings.keep_every)


def _gathered(snapshot: Snapshot, ranks: Ranks) -> Snapshot:
    """Weights whole, on rank 0."""
    whole = {f: whole_tensors(t, kept=ranks.is_main) for f, t in snapshot.weights.items()}
    return replace(snapshot, weights=whole)


def _write_in_shards(snapshot: Snapshot, target: Path, ranks: Ranks) -> None:
    """`Snapshot.write` by all ranks into one folder."""
    parts = {f: t for f, t in snapshot.weights.items() if has_shards(list(t.values()))}
    whole = {f: t for f, t in snapshot.weights.items() if f not in parts}
    with ExitStack() as stack:
        folder = ranks.on_main(stack.enter_context, whole_folder(target))
        for file, tensors in parts.items():
            write_shards(tensors, folder / shards_of(file), ranks.group)
        if snapshot.moments is not None:
            write_shards(snapshot.moments, folder / OPTIMIZER_SHARDS, ranks.group)
        if ranks.is_main:
            snapshot.state.write_weights(folder, whole)
            snapshot.write_facts(folder)
