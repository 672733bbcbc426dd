"""Encodes what runs will read of their clips, before any of them begins."""

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alignlab.config.parts import TeacherConfig
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.data.registry import build_splits
from alignlab.dataset_cache.disk_room import disk_room
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.store import write_reason
from alignlab.distributed.ranks import single_rank
from alignlab.errors import UserError
from alignlab.losses import OBJECTIVES
from alignlab.losses.objective import Grid
from alignlab.models.model_files import read_object
from alignlab.models.wan import checked_pipeline, frozen_parts
from alignlab.progress import step_progress, tell
from alignlab.runs.log_filters import quiet_libraries
from alignlab.sampling import negative_text
from alignlab.teachers import Teacher, teacher_from
from alignlab.training.alignment import check_noise
from alignlab.training.batches import ClipEncoder
from alignlab.training.clip_memory import ClipMemory
from alignlab.training.encoded import FeatureRead, TokenKind

SAMPLED = 3  # clips that tell how long the rest takes
AT_ONCE = 8  # clips that a worker is given
GB = 10**9


class Clip(NamedTuple):
    """A clip that is to be encoded."""

    split: str
    place: int


@dataclass(frozen=True)
class Built:
    """What `build_cache` did.

    Args:
        path: of the cache.
        clips: how many there are.
        encoded: of these, how many were not there whole.
        size: bytes that were written.
    """

    path: Path
    clips: int
    encoded: int
    size: int


def build_cache(runs: Sequence[RunConfig], *, workers: int = 1) -> list[Built]:
    """Encodes all train clips of runs, and the val clips that they measure.

    What is there is skipped, so that a build which was killed goes on. Before most of the work, it
    says how much space and time the first clips make one expect.

    Args:
        runs: that will read it, such as the variants of a comparison; features are those of all
            their teachers.
        workers: processes that encode at a time, each with models of its own.

    Raises:
        UserError: a recipe keeps no cache, a model or a clip cannot be used, or the disk is too
            small or takes no more.
    """
    alike: dict[str, list[RunConfig]] = {}
    for run in runs:
        if run.data.cache.mode == "off":
            raise UserError("data.cache.mode: off: no run would read the cache; set it to write")
        read: dict[str, Any] = {"model": {"path", "precision"}, "data": True, "output": True}
        alike.setdefault(run.model_dump_json(include=read), []).append(run)
    return [_build(group, workers) for group in alike.values()]


def _build(runs: Sequence[RunConfig], workers: int) -> Built:
    builder = CacheBuilder(runs)
    clips = builder.clips()
    missing = [clip for clip in clips if builder.lacks(clip)]
    builder.encode_rest()
    builder.flush()
    before, begin = builder.written(), time.monotonic()
    sampled, rest = missing[:SAMPLED], missing[SAMPLED:]
    for number, clip in enumerate(sampled):
        if number == 1:  # the first one loads the models
            begin = time.monotonic()
        builder.encode(clip)
    builder.flush()
    size = builder.written() - before
    if rest:
        seconds = (time.monotonic() - begin) * len(rest) / (SAMPLED - 1) / workers
        _tell_estimate(builder, len(rest), size * len(rest) / SAMPLED, seconds)
        is_here = workers == 1
        size += _encode_here(builder, rest) if is_here else _encode_there(runs, rest, workers)
    return Built(builder.values.cache.path, len(clips), len(missing), size)


class CacheBuilder:
    """Frozen models and data of runs that encode alike.

    Args:
        runs: with the same model, precision, data and output.
    """

    def __init__(self, runs: Sequence[RunConfig]) -> None:
        self._runs = runs
        first = runs[0]
        data = first.data
        cache = data.cache.model_copy(update={"mode": "write"})
        self.values = EncodedValues.of(cache, first.output)
        device = single_rank(first.model.precision).device
        folder = checked_pipeline(first.model.path)
        frozen = frozen_parts(folder, precision=first.model.precision, device=device)
        settings = read_object(folder / "transformer" / "config.json", setting="model.path")
        patch = settings.get("patch_size", (1, 2, 2))
        self._grid: Grid = frozen.token_grid(patch, data.frames, *data.size)
        splits = build_splits(data, memory=user_path(first.output))
        self._splits = {
            name: ClipEncoder(frozen, split, self.values, ClipMemory(0))
            for name, split in zip(("train", "val"), splits, strict=True)
        }
        self._device = device
        self._teachers: dict[str, Teacher] = {}
        self._reads = {"train": self._aligned(), "val": self._measured()}

    def clips(self) -> list[Clip]:
        """Those that the runs read."""
        measured = max(run.eval.num_read_clips for run in self._runs)
        counts = {
            "train": len(self._splits["train"]),
            "val": min(measured, len(self._splits["val"])),
        }
        return [Clip(split, index) for split, count in counts.items() for index in range(count)]

    def lacks(self, clip: Clip) -> bool:
        """Whether something of a clip is not there."""
        return self._splits[clip.split].lacks(clip.place, self._reads[clip.split])

    def encode(self, clip: Clip) -> None:
        """Makes what is not there.

        Raises:
            UserError: the disk takes no more.
        """
        encoded = self._splits[clip.split][clip.place]
        for read in self._reads[clip.split]:
            if read.kind == "video" or encoded.pixels.names:
                encoded.features(read)
        self._check_disk()

    def encode_rest(self) -> None:
        """Makes what is of no clip: prompts that stand for none, and features of noise."""
        clips, data = self._splits["train"], self._runs[0].data
        clips.text("", where="the empty prompt")
        for run in self._runs:
            clips.text(negative_text(run.eval.negative_prompt), where="eval.negative_prompt")
        for run in self._runs:
            used = {alias for o in run.objectives.values() for alias in o.teachers}
            for alias in filter(None, {*used, run.measured_against}):
                read = self._read(run.teachers[alias], "video")  # as a run looks at it first
                check_noise(f"teachers.{alias}", read, data, self.values)

    def flush(self) -> None:
        """Returns when all that was made is on the disk.

        Raises:
            UserError: it does not take it.
        """
        self.values.flush()
        self._check_disk()

    def _check_disk(self) -> None:
        cache = self.values.cache
        if cache.write_error is not None:
            raise UserError(
                f"{cache.path}: the disk takes no more ({write_reason(cache.write_error)}): free "
                "some space, or name another folder as data.cache.path, and build again; what is "
                "there is skipped"
            )

    def written(self) -> int:
        """Bytes of the values that this process has written."""
        return sum(count.written_bytes for count in self.values.cache.counts.values())

    def _aligned(self) -> list[FeatureRead]:
        """What objectives read of train clips."""
        reads: dict[FeatureRead, None] = {}
        for run in self._runs:
            for objective in run.objectives.values():
                kind = OBJECTIVES[objective.name].tokens
                for alias in objective.teachers:
                    reads[self._read(run.teachers[alias], kind)] = None
        return list(reads)

    def _measured(self) -> list[FeatureRead]:
        """What evaluations read of val clips."""
        reads: dict[FeatureRead, None] = {}
        for run in self._runs:
            if run.measured_against is None:
                continue
            teacher = run.teachers[run.measured_against]
            reads[self._read(teacher, "video")] = None
            if not self._teacher(teacher).is_video:
                reads[self._read(teacher, "reference")] = None
        return list(reads)

    def _read(self, teacher: TeacherConfig, kind: TokenKind) -> FeatureRead:
        own_HW = teacher.grid if kind == "video" else None
        return FeatureRead(self._teacher(teacher), kind, own_HW or self._grid[1:])

    def _teacher(self, config: TeacherConfig) -> Teacher:
        name = config.model_dump_json()
        if name not in self._teachers:
            self._teachers[name] = teacher_from(config, device=self._device, load=False)
        return self._teachers[name]


def _tell_estimate(builder: CacheBuilder, clips: int, size: float, seconds: float) -> None:
    """Says what the rest takes.

    Raises:
        UserError: the disk has less space.
    """
    path = builder.values.cache.path
    free, kept = disk_room(path)
    if size > free - kept:
        raise UserError(
            f"{path}: {clips} clips need about {size / GB:.1f} GB, and {free / GB:.1f} GB are "
            f"free, of which {kept / GB:.1f} GB are left to checkpoints: name a larger disk as "
            "data.cache.path"
        )
    tell(
        f"{path}: {clips} clips to encode, about {size / GB:.2f} GB and "
        f"{timedelta(seconds=round(seconds))}"
    )


def _encode_here(builder: CacheBuilder, clips: Sequence[Clip]) -> int:
    before = builder.written()
    with step_progress("cache build", total=len(clips)) as advance:
        for done, clip in enumerate(clips, start=1):
            builder.encode(clip)
            advance(done, clip.split)
    builder.flush()
    return builder.written() - before


def _encode_there(runs: Sequence[RunConfig], clips: Sequence[Clip], workers: int) -> int:
    """In processes of their own, which compute with as many threads: their number changes bits."""
    parts = [clips[start : start + AT_ONCE] for start in range(0, len(clips), AT_ONCE)]
    done = size = 0
    with (
        step_progress("cache build", total=len(clips)) as advance,
        ProcessPoolExecutor(
            min(workers, len(parts)),
            mp_context=get_context("spawn"),
            initializer=_begin_worker,
            initargs=([run.model_dump_json() for run in runs], torch.get_num_threads()),
        ) as pool,
    ):
        try:
            for number, written in pool.map(_encode_part, parts):
                done, size = done + number, size + written
                advance(done, "")
        except BrokenProcessPool as error:
            raise UserError(
                "a worker of the build ended before its work did, as one that the system kills "
                "for memory: use fewer --workers; what is there is skipped"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return size


_worker: list[CacheBuilder] = []  # of this process, if it is one


@quiet_libraries()
def _begin_worker(runs: Sequence[str], num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    _worker.append(CacheBuilder([RunConfig.model_validate_json(run) for run in runs]))


def _encode_part(clips: Sequence[Clip]) -> tuple[int, int]:
    """How many clips were encoded, and the bytes that were written of them."""
    (builder,) = _worker
    before = builder.written()
    for clip in clips:
        builder.encode(clip)
    builder.flush()
    return len(clips), builder.written() - before
