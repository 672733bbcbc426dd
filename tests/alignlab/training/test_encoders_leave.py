"""Frozen models are in memory only while something uses them."""

import errno
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn

from alignlab.config.run import RunConfig
from alignlab.evaluation.evaluate_run import evaluate_run
from alignlab.models.late_model import LateModel
from alignlab.models.wan import checked_pipeline, frozen_parts
from alignlab.recipe import has_recipe_hash, recipe_hash
from alignlab.sampling import sample_to_file
from alignlab.train import Trainer, train
from alignlab.training.setup import build_run, new_caches
from loaded_models import TEACHER, TEXT, VAE, LoadedModels
from run_contents import timeless_rows

MakeConfig = Callable[..., RunConfig]

GENERATES = (
    "eval.sample_clips=1",
    "eval.sample_steps=1",
    "eval.negative_prompt=wan",
    "objectives.ra.blocks=[0]",
)


@pytest.fixture
def in_steps(monkeypatch: pytest.MonkeyPatch, loaded_models: LoadedModels) -> list[set[str]]:
    """The models that are in memory after each step."""
    step, seen = Trainer.step, list[set[str]]()

    def looking(trainer: Trainer, batches: object) -> object:
        scalars = step(trainer, batches)  # type: ignore[arg-type]
        seen.append(loaded_models.alive())
        return scalars

    monkeypatch.setattr(Trainer, "step", looking)
    return seen


def full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_text_encoder_leaves_before_the_first_step(
    make_config: MakeConfig, loaded_models: LoadedModels, in_steps: list[set[str]]
) -> None:
    folder = train(make_config(*GENERATES, "name=auto"))
    assert len(in_steps) == 2 and all(TEXT.__name__ not in alive for alive in in_steps)
    assert loaded_models.counts[TEXT.__name__] == 1, "also for what is measured at the end"
    kept = train(
        make_config(
            *GENERATES,
            "name=keep",
            "model.text_encoder=keep",
            "output=" + str(folder.parent / "other"),
        )
    )
    assert all(TEXT.__name__ in alive for alive in in_steps[2:])
    assert timeless_rows(kept) == timeless_rows(folder)


@pytest.mark.parametrize(
    ("setting", "fails"),
    [
        ("data.cache.mode=off", False),
        ("data.cache.mode=read", False),
        ("data.cache.mode=write", True),
    ],
)
def test_where_texts_are_not_kept_their_encoder_is_loaded_once_and_stays(
    make_config: MakeConfig,
    loaded_models: LoadedModels,
    in_steps: list[set[str]],
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    fails: bool,
) -> None:
    if fails:
        monkeypatch.setattr("alignlab.dataset_cache.store.write_shard", full)
        monkeypatch.setattr("alignlab.dataset_cache.store.SHARD_ENTRIES", 1)
    train(make_config(setting, aligned=False))
    assert len(in_steps) == 2 and all(TEXT.__name__ in alive for alive in in_steps)
    assert loaded_models.counts[TEXT.__name__] == 1


def test_a_warm_run_trains_without_any_frozen_model(
    make_config: MakeConfig, loaded_models: LoadedModels, in_steps: list[set[str]]
) -> None:
    train(make_config(*GENERATES, "name=cold"))
    loaded_models.counts.clear()
    train(make_config(*GENERATES, "name=warm"))
    assert in_steps[2:] == [set()] * 2
    assert loaded_models.counts == {VAE.__name__: 1, TEACHER.__name__: 1}, "of what is generated"


def test_only_what_the_run_draws_and_measures_is_encoded(make_config: MakeConfig) -> None:
    config = make_config("data.train_clips=500", "steps=3", "eval.clips=2")
    caches = new_caches(config)
    train(config, caches=caches)
    counts = caches.values.cache.counts["text"]
    assert 1 < counts.written <= 3 * 2 + 2 + 1 and counts.written == counts.misses


def test_a_text_that_comes_later_loads_its_encoder_again_and_says_so(
    make_config: MakeConfig, loaded_models: LoadedModels, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "alignlab")
    config = make_config("steps=1", "eval.clips=2")
    caches = new_caches(config)
    train(config, caches=caches)
    assert "loaded again" not in caplog.text and caches.frozen is not None
    caches.frozen.encode_text(["a text of no clip"])
    assert caplog.text.count("the text encoder is loaded again") == 1
    assert loaded_models.counts[TEXT.__name__] == 2


def test_a_moved_run_is_sampled_and_evaluated_with_its_cache(
    make_config: MakeConfig, tmp_path: Path, loaded_models: LoadedModels
) -> None:
    folder = train(make_config(*GENERATES, f"output={tmp_path / 'here'}"))
    caption = "a text of no clip"
    before = sample_to_file(folder, caption, (), tmp_path / "before.mp4", seed=3)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = tmp_path / "there" / folder.name
    loaded_models.counts.clear()
    evaluate_run(moved)
    assert loaded_models.counts[TEXT.__name__] == 0
    again = sample_to_file(moved, caption, (), tmp_path / "after.mp4", seed=3)
    assert again.read_bytes() == before.read_bytes() and loaded_models.counts[TEXT.__name__] == 1
    sample_to_file(moved, "", (), tmp_path / "empty.mp4")
    assert loaded_models.counts[TEXT.__name__] == 1, "both prompts are in the cache"
    assert not (tmp_path / "here").exists()


def test_where_the_text_encoder_runs_is_part_of_what_a_run_is(make_config: MakeConfig) -> None:
    auto = make_config()
    keep, cpu = (make_config(f"model.text_encoder={place}") for place in ("keep", "cpu"))
    assert recipe_hash(keep) == recipe_hash(auto) != recipe_hash(cpu)
    assert has_recipe_hash(keep, recipe_hash(auto)) and not has_recipe_hash(cpu, recipe_hash(auto))


def test_the_text_encoder_runs_on_the_cpu_where_the_recipe_says_so(wan_folder: Path) -> None:
    folder = checked_pipeline(str(wan_folder))
    here = frozen_parts(folder, precision="fp32", device="cpu")
    there = frozen_parts(folder, precision="fp32", device="meta", text_encoder="cpu")
    prompts = ["a red circle"]
    assert torch.equal(here.encode_text(prompts), there.encode_text(prompts))
    assert here.text.parts == there.text.parts, "so that their embeddings are the same entries"
    unset = frozen_parts(folder, precision="fp32", device="meta")
    assert unset.text.device.type == "meta" and there.device.type == "meta"


class Moved(nn.Module):
    """Knows where it was moved to."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def to(self, device: torch.device) -> "Moved":  # type: ignore[override]
        self.places.append(device.type)
        return self


def test_a_parked_model_is_on_its_device_only_while_it_is_used() -> None:
    parked = LateModel(Moved, torch.device("cuda"), is_parked=True)
    with parked.in_use() as model, parked.in_use():
        assert model.places == ["cuda"]
    assert model.places == ["cuda", "cpu"]
    with pytest.raises(KeyError), parked.in_use():
        raise KeyError
    assert model.places == ["cuda", "cpu"] * 2
    staying = LateModel(Moved, torch.device("cuda"))
    for _ in range(2):
        with staying.in_use() as model:
            assert model.places == ["cuda"]
    assert staying.num_loads == 1


@pytest.mark.parametrize(
    ("setting", "parked"), [("data.cache.mode=write", True), ("data.cache.latents=false", False)]
)
def test_the_autoencoder_is_parked_where_latents_are_kept(
    make_config: MakeConfig, setting: str, parked: bool
) -> None:
    assert build_run(make_config(setting)).wan.frozen.parks_vae == parked
