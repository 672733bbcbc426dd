"""`alignlab cache build`: afterwards nothing that a run reads has to be encoded."""

import errno
import pickle
import re
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from alignlab.config.run import RunConfig
from alignlab.dataset_cache.survey import survey
from alignlab.errors import UserError
from alignlab.experiments.launchers.local import threads
from alignlab.recipe import dump
from alignlab.train import train
from alignlab.training import cache_build
from alignlab.training.cache_build import Encoders, Here, LocalProcesses, build_cache
from alignlab.training.cache_builder import CacheBuilder, Clip
from command_line import alignlab, refused
from loaded_models import TEXT, VAE, LoadedModels

MakeConfig = Callable[..., RunConfig]

SETTINGS = ("data.references=[0,3]", "eval.clips=2", "eval.negative_prompt=wan", "steps=1")
OTHER = (
    "teachers.early={family: dinov2, path: PATH, feature: 'layer:0'}",
    "objectives.rp={name: repa, teacher: early, blocks: [3], projector_dim: 32}",
)


def variants(make: MakeConfig, *overrides: str) -> list[RunConfig]:
    """Two runs that read different features of the same clips."""
    first = make(*SETTINGS, *overrides, "name=first")
    path = str(first.teachers["dino"].path)
    others = [one.replace("PATH", path) for one in OTHER]
    return [first, make(*SETTINGS, *others, *overrides, "name=second")]


@pytest.mark.parametrize(
    ("encoders", "at_once", "start"),
    [
        (Here(), 2, "spawn"),
        (LocalProcesses(2), 8, "spawn"),  # one process: each imports torch
        (LocalProcesses(2), 2, "fork"),
    ],
    ids=["here", "a process", "two processes"],
)
def test_what_is_built_is_all_that_the_runs_of_a_comparison_read(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    encoders: Encoders,
    at_once: int,
    start: str,
) -> None:
    monkeypatch.setattr(cache_build, "AT_ONCE", at_once)
    monkeypatch.setattr(cache_build, "get_context", lambda kind: get_context(start))
    with threads(1):  # OpenMP's threads are not in a forked process, which would wait for them
        (built,) = build_cache(variants(make_config), encoders)
        assert (built.clips, built.encoded) == (8, 8) and built.size > 0
        for run in variants(make_config, "data.cache.mode=require"):
            train(run)


def test_what_is_there_is_skipped(make_config: MakeConfig) -> None:
    first, second = variants(make_config)
    build_cache([first])
    (again,) = build_cache([first])
    assert (again.encoded, again.size) == (0, 0)
    (more,) = build_cache([first, second])
    assert more.encoded == 6  # features of one more teacher, of the train clips
    shards = (more.path / "shards").glob("*.safetensors")
    max(shards, key=lambda shard: shard.stat().st_mtime_ns).unlink()
    (mended,) = build_cache([first, second])
    assert 0 < mended.encoded <= 3  # of the six, the first three are in a shard of their own
    assert build_cache([first, second])[0].encoded == 0


def test_a_build_that_stops_keeps_what_it_has(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, taken = CacheBuilder.encode, list[Clip]()

    def stopping(builder: CacheBuilder, clip: Clip) -> None:
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(clip)
        encode(builder, clip)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CacheBuilder, "encode", stopping)
        build_cache(variants(make_config)[:1])
    (rest,) = build_cache(variants(make_config)[:1])
    assert 3 <= rest.encoded <= 5  # the first three were on the disk before the rest began


def test_a_full_disk_is_told_before_the_work(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_build, "disk_room", lambda path: (5e9 + 10, 5e9))
    with pytest.raises(
        OSError, match=r"about [\d.]+ [kM]B, and 5 GB are free.*a larger disk"
    ) as info:
        build_cache(variants(make_config)[:1])
    assert "\n" not in str(info.value)


def test_a_build_that_the_disk_does_not_take_fails(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("alignlab.dataset_cache.store.write_shard", full)
    monkeypatch.setattr(cache_build, "_worker", [])
    (config, _) = variants(make_config)
    with pytest.raises(OSError, match=r"the disk takes no more \(the disk is full\): free"):
        build_cache([config])
    cache_build._begin_worker([config.model_dump_json()], torch.get_num_threads())
    with pytest.raises(OSError, match=r"the disk takes no more") as caught:
        cache_build._encode_part([Clip("train", 0)])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_small_disk_is_the_machines_fault(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignlab.dataset_cache.disk_room.AT_LEAST", 10**18)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(make_config(*SETTINGS)))
    result = alignlab("cache", "build", recipe)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "the disk takes no more" in result.stderr


def test_the_command_tells_a_small_size_in_three_digits(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(make_config(*SETTINGS)))
    result = alignlab("cache", "build", recipe)
    assert result.exit_code == 0, result.stderr
    assert re.search(r": 8 clips, 8 of them encoded now \([\d.]{3,4} kB\)\n$", result.stdout), (
        result.stdout
    )


def test_a_cache_that_no_run_reads_is_not_built(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.cache\.mode: off"):
        build_cache([make_config("data.cache.mode=off")])
    assert not (tmp_path / "cache").exists()


def test_what_encodes_leaves_when_the_build_is_done(
    make_config: MakeConfig, loaded_models: LoadedModels
) -> None:
    build_cache(variants(make_config)[:1])
    assert len(loaded_models.counts) == 3 and loaded_models.alive() == set()


def test_features_that_are_not_kept_are_not_made(
    make_config: MakeConfig, loaded_models: LoadedModels
) -> None:
    (built,) = build_cache([make_config(*SETTINGS, "data.cache.teachers=false")])
    assert built.encoded == 8
    assert set(loaded_models.counts) == {TEXT.__name__, VAE.__name__}


def test_prune_removes_what_a_recipe_does_not_read(make_config: MakeConfig, tmp_path: Path) -> None:
    both = variants(make_config)
    recipes = [tmp_path / f"{run.name}.yaml" for run in both]
    for recipe, run in zip(recipes, both, strict=True):
        recipe.write_text(dump(run))
    (built,) = build_cache(both)
    count = len(list(survey(built.path).rows()))

    def prune(*options: object) -> str:
        return alignlab("cache", "prune", built.path, *options).stdout

    with threads(torch.get_num_threads() + 1):  # as on another machine
        assert "read by none" not in prune("--unused-by", recipes[0], "--unused-by", recipes[1])
    told = f"7 entries: read by none of {recipes[0]}\n"  # features of six clips, and of noise
    dry = prune("--unused-by", recipes[0], "--dry-run")
    assert told in dry and f"would stay: {count - 7} entries" in dry
    assert told in prune("--unused-by", recipes[0])
    line = refused("cache", "prune", built.path, "--unused-by", "tiny")
    assert "the recipes named read nothing of it, which stays" in line
    train(variants(make_config, "data.cache.mode=require")[0])
    (again,) = build_cache(both)
    assert again.encoded == 6
