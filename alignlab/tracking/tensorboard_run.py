"""TensorBoard: one event file in `<run>/tensorboard`, with the rows of `metrics.jsonl`.

An event file can only be added to, and a resumed run writes rows again that it had written after
its checkpoint. So the file is written anew from `metrics.jsonl` whenever the training begins or is
resumed, and the earlier one is emptied: no row is there twice, and none is missing. A TensorBoard
that is open, and has read the earlier file, is told to drop what it had (its `purge_step`); it
would read nothing more if that file were gone, so empty ones go at the next resume only.

The records are written here, not by `SummaryWriter`: its thread would leave a training waiting for
ever where the disk is full.
"""

import os
import socket
import time
import uuid
from collections.abc import Sequence
from typing import Any

from alignlab.config.parts import TrainingConfig
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking.other_trackers import OtherTracker
from alignlab.tracking.points import Point

FOLDER = "tensorboard"  # also in `START_FOLDERS` of a run folder
SUFFIX = ".alignlab"  # of our files: what others put there stays


class TensorBoardRun(OtherTracker):
    """An event file, to which every row is written at once; values have 32 bits in it."""

    def __init__(self, folder: RunFolder, config: TrainingConfig, *, anew: bool) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        path = folder.path / FOLDER
        path.mkdir(exist_ok=True)
        earlier = list(path.glob(f"events.out.tfevents.*{SUFFIX}"))
        now = time.time()
        # TensorBoard reads the files of a folder in the order of their names
        unique = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        name = f"events.out.tfevents.{now:017.6f}.{unique}{SUFFIX}"
        self._file = (path / name).open("wb", buffering=0)
        self._records: Any = RecordWriter(self._file)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        self._write(Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START)))
        for file in earlier:
            if file.stat().st_size:
                os.truncate(file, 0)
            else:
                file.unlink()

    def log(self, row: Sequence[Point]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=point.name, simple_value=point.value) for point in row]
        summary = Summary(value=values)
        self._write(Event(wall_time=row[0].time_s, step=row[0].step, summary=summary))

    def end(self, status: str) -> None:
        self._file.close()

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        return (OSError, ImportError)

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
