"""`alignlab cache build --launcher ray`: what nodes encode is what trainings there read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ray_tools
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.local import threads
from alignlab.experiments.launchers.ray_cache import MARK, OnRay
from alignlab.experiments.launchers.ray_cluster import MOST_DEATHS, Ended
from alignlab.recipe import load_run
from alignlab.train import train
from alignlab.training import cache_build
from alignlab.training.cache_build import Alike, Sampled, build_cache
from alignlab.training.cache_builder import Clip
from command_line import refused

WAIT_S = 300


class LostTasks:
    """Stands for the tasks of a cluster with one node; the first of each part are lost.

    Args:
        deaths: how many.
        left: clips that the sample leaves.
    """

    threads = 1

    def __init__(self, deaths: int, left: int) -> None:
        self._deaths, self._left = deaths, [Clip("train", i) for i in range(left)]
        self._starts: dict[int, int] = {}
        self.running: dict[int, Any] = {}
        self.encoded: list[tuple[str, int]] = []
        self.marks: list[str] = []

    def start(self, number: int, order: Any) -> None:
        self._starts[number] = self._starts.get(number, 0) + 1
        self.running[number] = order["clips"]
        self.marks.append(order["mark"])

    def ended(self, seconds: float) -> Iterator[Ended[int]]:
        number, clips = self.running.popitem()
        if self._starts[number] <= self._deaths:
            yield Ended(number, None, "NodeDiedError")
        elif clips == "first":
            yield Ended(number, None, None, tuple(Sampled(9, self._left, 3, 30, 1.0)))
        elif clips == "last":
            yield Ended(number, None, None, 7 if self._left else 0)
        else:
            self.encoded += clips
            yield Ended(number, None, None, (len(clips), 10 * len(clips)))

    def begin_anew(self) -> None:
        self._starts.clear()

    def room(self) -> int:
        return 1

    def warn_without_room(self) -> None:
        pass


def marks(output: Path) -> list[str]:
    return [path.name for path in (output / "cache").glob(f"{MARK}*")]


def on_ray(tasks: LostTasks) -> OnRay:
    encoders = OnRay(LaunchConfig(), None)
    vars(encoders)["_tasks"] = tasks
    return encoders


def test_a_part_whose_process_dies_is_encoded_by_another(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_build, "AT_ONCE", 2)
    tasks = LostTasks(MOST_DEATHS - 1, left=5)
    with on_ray(tasks) as encoders:
        (built,) = build_cache([load_run(recipe_file, [f"output={tmp_path}"])], encoders)
    assert (built.clips, built.encoded, built.size) == (9, 8, 87)
    assert sorted(tasks.encoded) == [("train", i) for i in range(5)]
    assert not marks(tmp_path)


def test_a_part_that_ends_every_process_ends_the_build(recipe_file: Path, tmp_path: Path) -> None:
    line = rf"died {MOST_DEATHS} times on the same clips"
    with pytest.raises(ChildProcessError, match=line) as caught:
        with on_ray(LostTasks(MOST_DEATHS, left=5)) as encoders:
            build_cache([load_run(recipe_file, [f"output={tmp_path}"])], encoders)
    assert "\n" not in str(caught.value)
    assert not marks(tmp_path)


def test_deaths_are_not_counted_across_what_is_encoded_apart(recipe_file: Path) -> None:
    tasks = LostTasks(MOST_DEATHS - 1, left=0)
    alike: Alike = [load_run(recipe_file)]
    with on_ray(tasks) as encoders:
        for _ in range(2):
            assert list(encoders.encode(alike, [Clip("train", 0)])) == [(1, 10)]
            tasks.begin_anew()


def test_builds_of_one_cache_do_not_end_each_other(recipe_file: Path, tmp_path: Path) -> None:
    alike: Alike = [load_run(recipe_file, [f"output={tmp_path}"])]
    longer, shorter = LostTasks(0, left=1), LostTasks(0, left=1)
    with on_ray(longer) as encoders:
        encoders.sample(alike)
        with on_ray(shorter) as others:
            others.sample(alike)
            assert sorted(marks(tmp_path)) == sorted(longer.marks + shorter.marks)
        assert marks(tmp_path) == longer.marks, "nodes still look for it"
    assert not marks(tmp_path)


def test_options_that_nothing_reads_are_refused(recipe_file: Path) -> None:
    line = refused("cache", "build", recipe_file, "--launcher", "ray", "--workers", "2")
    assert line.startswith("error: --workers: on Ray")
    line = refused("cache", "build", recipe_file, "--ray-address", "auto")
    assert line.startswith("error: --ray-address: nothing reads it")


@pytest.mark.slow
def test_nodes_of_a_cluster_build_what_a_run_reads(recipe_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'alignlab[ray]'")
    log, words = (
        tmp_path / "out.txt",
        [str(recipe_file), f"output={tmp_path}", "data.train_clips=30"],
    )
    build = ["cache", "build", *words, "--launcher", "ray"]
    for encoded in (32, 0):
        with ray_tools.nodes("") as cluster:
            with ray_tools.command(log, *build, "--ray-address", cluster.address) as driver:
                assert driver.wait(WAIT_S) == 0, log.read_text()
        assert f"32 clips, {encoded} of them encoded now" in log.read_text()
    assert "Ray: nodes: 2; each process of the build takes 1 CPU" in log.read_text()
    assert " process " in (tmp_path / "cache" / "worker.log").read_text()
    with threads(1):
        train(load_run(recipe_file, [*words[1:], "data.cache.mode=require"]))
