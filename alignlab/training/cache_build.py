"""Encodes what trainings will read of their clips, before any of them begins."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alignlab import interruption
from alignlab.config.run import RunConfig
from alignlab.dataset_cache.disk_room import disk_room, size_text
from alignlab.dataset_cache.encoded_values import cache_path
from alignlab.errors import UserError
from alignlab.progress import step_progress, tell
from alignlab.recipe import validated
from alignlab.runs.log_filters import quiet_libraries
from alignlab.stage1.cache_builder import Stage1CacheBuilder
from alignlab.stage1.config import Stage1Config
from alignlab.training.cache_builder import CacheBuilder, Clip, RunCacheBuilder
from alignlab.training.setup import MADE_AHEAD, encoding_settings

SAMPLED = 3  # clips that tell how long the rest takes
AT_ONCE = 8  # clips that a worker is given

Training = RunConfig | Stage1Config
Alike = list[Training]
"""Recipes that encode alike, and read one cache."""


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


class Sampled(NamedTuple):
    """What the first clips make one expect.

    Args:
        clips: how many there are.
        left: those that are not encoded yet.
        encoded: how many are.
        size: bytes of these.
        seconds: that a clip takes.
    """

    clips: int
    left: list[Clip]
    encoded: int
    size: int
    seconds: float


class Encoders(ABC):
    """Who encodes the clips of trainings that encode alike.

    Attributes:
        workers: how many do at a time, for the estimate.
    """

    workers: int = 1

    @abstractmethod
    def sample(self, alike: Alike) -> Sampled:
        """Encodes what is of no clip, and the first clips."""

    @abstractmethod
    def encode(self, alike: Alike, clips: Sequence[Clip]) -> Iterator[tuple[int, int]]:
        """Encodes clips; gives the number and the bytes of those that have just been."""

    @abstractmethod
    def finish(self, alike: Alike) -> int:
        """Makes what is of many clips, once all are encoded; gives the bytes that were written."""


def build_cache(trainings: Sequence[Training], encoders: Encoders | None = None) -> list[Built]:
    """Encodes all train clips of trainings, and the val clips that they measure.

    What is there is skipped, so that a build which was killed goes on. Before most of the work, it
    says how much space and time the first clips make one expect.

    Args:
        trainings: that will read it, such as the variants of a comparison, or one of Stage 1;
            features are those of all their teachers.
        encoders: who encodes; None: this process.

    Raises:
        UserError: a recipe keeps no cache, or a model or a clip cannot be used.
        OSError: the disk is too small or takes no more, or a worker was killed.
    """
    if any(training.data.cache.mode == "off" for training in trainings):
        raise UserError("data.cache.mode: off: no run would read the cache; set it to write")
    return [_build(alike, encoders or Here()) for alike in _groups(trainings)]


def used_entries(trainings: Sequence[Training]) -> set[str]:
    """What trainings read of a dataset cache (`CacheBuilder.used_entries`)."""
    return set[str]().union(*(builder_of(alike).used_entries() for alike in _groups(trainings)))


def builder_of(alike: Alike) -> CacheBuilder:
    """Loads nothing yet."""
    stage1 = [training for training in alike if isinstance(training, Stage1Config)]
    if stage1:
        return Stage1CacheBuilder(stage1[0])
    return RunCacheBuilder([training for training in alike if isinstance(training, RunConfig)])


def sample(builder: CacheBuilder) -> Sampled:
    """See `Encoders.sample`."""
    clips = builder.clips()
    missing = [clip for clip in clips if builder.lacks(clip)]
    builder.make_rest()
    builder.flush()
    before, begin = builder.written(), time.monotonic()
    sampled, left = missing[:SAMPLED], missing[SAMPLED:]
    for number, clip in enumerate(sampled):
        if number == 1:  # the first one loads the models
            begin = time.monotonic()
        builder.encode(clip)
    builder.flush()
    seconds = (time.monotonic() - begin) / (SAMPLED - 1)
    return Sampled(len(clips), left, len(sampled), builder.written() - before, seconds)


def encode_part(builder: CacheBuilder, clips: Sequence[Clip]) -> tuple[int, int]:
    """How many clips were encoded, and the bytes that were written of them."""
    before = builder.written()
    for clip in clips:
        interruption.check()
        builder.encode(clip)
    builder.flush()
    return len(clips), builder.written() - before


def finish(builder: CacheBuilder) -> int:
    """See `Encoders.finish`."""
    before = builder.written()
    builder.make_last()
    builder.flush()
    return builder.written() - before


def to_text(alike: Alike) -> list[str]:
    """Recipes as JSON, for another process."""
    return [training.model_dump_json() for training in alike]


def from_text(texts: Sequence[str]) -> Alike:
    """The recipes of `to_text`."""
    return [_training(json.loads(text)) for text in texts]


def parts_of(clips: Sequence[Clip]) -> list[Sequence[Clip]]:
    """What a worker is given at once."""
    return [clips[start : start + AT_ONCE] for start in range(0, len(clips), AT_ONCE)]


class Here(Encoders):
    """This process."""

    def __init__(self) -> None:
        self._builder: CacheBuilder | None = None  # with the models of the sample

    def sample(self, alike: Alike) -> Sampled:
        self._builder = None  # frees those of other recipes
        self._builder = builder_of(alike)
        return sample(self._builder)

    def encode(self, alike: Alike, clips: Sequence[Clip]) -> Iterator[tuple[int, int]]:
        assert self._builder is not None  # of `sample`
        before = self._builder.written()
        for clip in clips:
            self._builder.encode(clip)
            yield 1, 0
        self._builder.flush()
        yield 0, self._builder.written() - before

    def finish(self, alike: Alike) -> int:
        assert self._builder is not None  # of `sample`
        return finish(self._builder)


class LocalProcesses(Encoders):
    """Processes of this machine, which compute with as many threads: their number changes bits.

    Args:
        workers: how many, each with models of its own.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def sample(self, alike: Alike) -> Sampled:
        return sample(builder_of(alike))

    def encode(self, alike: Alike, clips: Sequence[Clip]) -> Iterator[tuple[int, int]]:
        parts = parts_of(clips)
        with ProcessPoolExecutor(
            min(self.workers, len(parts)),
            mp_context=get_context("spawn"),
            initializer=_begin_worker,
            initargs=(to_text(alike), torch.get_num_threads()),
        ) as pool:
            try:
                yield from pool.map(_encode_part, parts)
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a worker of the build ended before its work did, as one that the system kills "
                    "for memory: use fewer --workers; what is there is skipped"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def finish(self, alike: Alike) -> int:
        return finish(builder_of(alike))


def _build(alike: Alike, encoders: Encoders) -> Built:
    sampled = encoders.sample(alike)
    encoded, size = sampled.encoded, sampled.size
    path = cache_path(alike[0].data.cache, alike[0].output)
    if sampled.left:
        total = len(sampled.left)
        expected = size * total / encoded
        _tell_estimate(path, total, expected, sampled.seconds * total / encoders.workers)
        done = 0
        with step_progress("cache build", total=total) as advance:
            for number, written in encoders.encode(alike, sampled.left):
                done, size = done + number, size + written
                advance(done, "")
        encoded += done
    size += encoders.finish(alike)
    return Built(path, sampled.clips, encoded, size)


def _tell_estimate(path: Path, clips: int, size: float, seconds: float) -> None:
    """Says what the rest takes.

    Raises:
        OSError: the disk has less space.
    """
    free, kept = disk_room(path)
    if size > free - kept:
        raise OSError(
            f"{path}: {clips} clips need about {size_text(size)}, and {size_text(free)} are free, "
            f"of which {size_text(kept)} are left to checkpoints: name a larger disk as "
            "data.cache.path"
        )
    tell(
        f"{path}: {clips} clips to encode, about {size_text(size)} and "
        f"{timedelta(seconds=round(seconds))}"
    )


_worker: list[CacheBuilder] = []  # of this process, if it is one


@quiet_libraries()
def _begin_worker(alike: Sequence[str], num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    _worker.append(builder_of(from_text(alike)))


def _encode_part(clips: Sequence[Clip]) -> tuple[int, int]:
    (builder,) = _worker
    return encode_part(builder, clips)


def _training(settings: dict[str, Any]) -> Training:
    if "stage1" in settings:
        return validated(Stage1Config, settings, stored=True)
    return validated(RunConfig, settings, stored=True)


def _groups(trainings: Sequence[Training]) -> list[Alike]:
    alike: dict[str, Alike] = {}
    for training in trainings:
        alike.setdefault(_what_is_read(training), []).append(training)
    return list(alike.values())


def _what_is_read(training: Training) -> str:
    """Equal for trainings that encode alike."""
    if isinstance(training, RunConfig):
        return encoding_settings(training)
    read = {"data", "output", "model", "teachers", "stage1"}
    return training.model_dump_json(include=read, exclude=MADE_AHEAD)
