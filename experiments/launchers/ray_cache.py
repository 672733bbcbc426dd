"""`alignlab cache build` on the nodes of a Ray cluster, which write into a cache that all share."""

import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from alignlab.dataset_cache.encoded_values import cache_path
from alignlab.errors import UserError
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.node import LOG, Order, arrive, order_for, working
from alignlab.experiments.launchers.ray_cluster import MOST_DEATHS, Deaths, RayTasks, connected
from alignlab.training.cache_build import (
    Alike,
    Encoders,
    Sampled,
    builder_of,
    encode_part,
    finish,
    from_text,
    parts_of,
    sample,
    to_text,
)
from alignlab.training.cache_builder import CacheBuilder, Clip

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
QUEUED = 2  # parts of the work by place of the cluster: a node has the next one when it is done
MARK = ".ray-build-"  # a build's own file in the cache's folder while it lasts: nodes look for it
FIRST, LAST = -1, -2
Part = Sequence[Clip] | Literal["first", "last"]

_builders: dict[tuple[str, ...], CacheBuilder] = {}  # a worker process gets several parts


class BuildOrder(Order):
    """What is to be encoded.

    Args:
        alike: the recipes, as JSON.
        clips: split and place of each; `first`: what is of no clip, and the first clips; `last`:
            what is of many clips.
        mark: name of a file in the cache's folder that is there while the build lasts.
    """

    alike: list[str]
    clips: list[tuple[str, int]] | Literal["first", "last"]
    mark: str


def encode_clips(order: BuildOrder) -> Any:
    """On a node: encodes clips; gives what `sample`, `encode_part` or `finish` does.

    Log lines go to `worker.log` in the cache's folder. The models stay in the process for the next
    part.

    Raises:
        UserError: this node has other code or does not see the cache, or a clip cannot be encoded.
    """
    setting = "the dataset cache (data.cache.path, or output)"
    folder = arrive(order, holds=order["mark"], setting=setting)
    with working(folder / LOG, order["threads"]):
        name = tuple(order["alike"])
        if name not in _builders:
            _builders.clear()  # frees the models of other recipes
            _builders[name] = builder_of(from_text(order["alike"]))
        builder = _builders[name]
        if order["clips"] == "first":
            return sample(builder)
        if order["clips"] == "last":
            return finish(builder)
        return encode_part(builder, [Clip(*clip) for clip in order["clips"]])


class OnRay(Encoders):
    """Nodes of a cluster; a part whose process dies is encoded by another.

    What the keys of entries hold, such as the kind of device, is found out on a node as well: this
    process may have none of that kind.

    Args:
        needs: what Ray reserves for each process.
        address: `HOST:PORT` or `auto`; None: `RAY_ADDRESS`, else a new cluster on this machine.
    """

    def __init__(self, needs: LaunchConfig, address: str | None) -> None:
        self._needs = needs
        self._address = address
        self._stack = ExitStack()
        self._mark = f"{MARK}{uuid.uuid4().hex}"  # other builds may write into the same cache

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @cached_property
    def _tasks(self) -> RayTasks[int]:
        cluster = self._stack.enter_context(connected(self._address))
        tasks: RayTasks[int] = RayTasks(cluster, self._needs, encode_clips)
        self._stack.callback(tasks.cancel)
        log.info(
            "Ray: nodes: %d; each process of the build takes %s",
            *(len(cluster.nodes()), tasks.shown_needs()),
        )
        return tasks

    def sample(self, alike: Alike) -> Sampled:
        folder = _folder(alike)
        folder.mkdir(parents=True, exist_ok=True)
        self._stack.callback((folder / self._mark).unlink, missing_ok=True)
        (folder / self._mark).touch()
        (sampled,) = self._values(alike, {FIRST: "first"})
        self.workers = max(1, self._tasks.room())
        return Sampled(*sampled)

    def encode(self, alike: Alike, clips: Sequence[Clip]) -> Iterator[tuple[int, int]]:
        yield from self._values(alike, dict(enumerate(parts_of(clips))))

    def finish(self, alike: Alike) -> int:
        (written,) = self._values(alike, {LAST: "last"})
        return int(written)

    def _values(self, alike: Alike, parts: dict[int, Part]) -> Iterator[Any]:
        """What tasks give for parts of the work, as they end."""
        tasks, left = self._tasks, list(reversed(parts))
        all_deaths = Deaths[int]()  # numbers of parts are those of this call
        while left or tasks.running:
            while left and len(tasks.running) < QUEUED * max(1, tasks.room()):
                self._start(alike, (number := left.pop()), parts[number])
            tasks.warn_without_room()
            for number, error, loss, value in tasks.ended(LOOK_EVERY_S):
                if error is not None:
                    raise UserError(error)
                if loss is None:
                    yield value
                    continue
                deaths = all_deaths.count(number, None)
                if deaths == MOST_DEATHS:
                    raise ChildProcessError(
                        f"a process of the build died {deaths} times on the same clips ({loss}): "
                        f"see {_folder(alike) / LOG}"
                    )
                log.info("a process of the build died (%s); another takes its clips", loss)
                left.append(number)

    def _start(self, alike: Alike, number: int, clips: Part) -> None:
        order = BuildOrder(
            **order_for(_folder(alike), self._tasks.threads),
            alike=to_text(alike),
            clips=clips if isinstance(clips, str) else [(clip.split, clip.place) for clip in clips],
            mark=self._mark,
        )
        self._tasks.start(number, order)


def _folder(alike: Alike) -> Path:
    return cache_path(alike[0].data.cache, alike[0].output)
