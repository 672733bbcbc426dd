"""Frozen models are in memory only while something uses them."""

import errno
import gc
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from alignlab.config.run import RunConfig
from alignlab.distributed.ranks import Ranks
from alignlab.evaluation.evaluate_run import evaluate_run
from alignlab.models.late_model import CPU, LateModel
from alignlab.models.wan import checked_pipeline, frozen_parts
from alignlab.recipe import has_recipe_hash, recipe_hash
from alignlab.sampling import sample_to_file
from alignlab.train import Trainer, train
from alignlab.training import checkpoint
from alignlab.training.setup import build_run, new_caches
from alignlab.training.texts_ahead import encode_training_texts
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
    make_config: MakeConfig,
    tmp_path: Path,
    loaded_models: LoadedModels,
    caplog: pytest.LogCaptureFixture,
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
    (tmp_path / "there" / "cache" / "recipe.yaml").touch()  # as of a run with that name
    sample_to_file(moved, caption, (), tmp_path / "live.mp4", seed=3)
    assert (tmp_path / "live.mp4").read_bytes() == before.read_bytes()
    assert caplog.text.count("the prompts are encoded without the dataset cache: ") == 1


def test_the_text_encoder_leaves_before_a_checkpoint_is_read(
    make_config: MakeConfig,
    tmp_path: Path,
    loaded_models: LoadedModels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(make_config("steps=1", aligned=False))
    shutil.rmtree(tmp_path / "cache")
    loaded_models.counts.clear()
    restore, seen = checkpoint.restore, list[tuple[int, bool]]()

    def looking(*args: Any, **settings: Any) -> None:
        alive = TEXT.__name__ in loaded_models.alive()
        seen.append((loaded_models.counts[TEXT.__name__], alive))
        restore(*args, **settings)

    monkeypatch.setattr(checkpoint, "restore", looking)
    train(make_config("steps=2", aligned=False))
    assert seen == [(1, False)]


class OneOfTwo(Ranks):
    """The second of two ranks; the other one has encoded nothing when it is met.

    Args:
        meet: called where it waits for the other.
    """

    def __init__(self, meet: Callable[[], None]) -> None:
        super().__init__(CPU, "fp32")
        self.rank, self.world_size, self._meet = 1, 2, meet

    def barrier(self) -> None:
        self._meet()


def test_ranks_that_draw_the_same_clips_share_their_texts(make_config: MakeConfig) -> None:
    run = build_run(make_config("data.train_clips=30", "steps=120", "optim.batch_size=2"))
    count, when_met = run.caches.values.cache.counts["text"], list[int]()
    run.ranks = OneOfTwo(lambda: when_met.append(count.written))
    encode_training_texts(run, 0)
    texts = run.clips.captions(range(30))
    assert when_met == [len(texts) // 2]
    assert count.written == len({*texts, ""}), "what the other one did not keep"


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


def test_a_held_model_stays_on_its_device_from_its_first_use_on() -> None:
    parked = LateModel(Moved, torch.device("cuda"), is_parked=True)
    with parked.held():
        assert not parked.is_loaded
        for _ in range(3):
            with parked.in_use() as model:
                assert model.places == ["cuda"]
    assert model.places == ["cuda", "cpu"]


def test_what_is_freed_is_gone_although_it_refers_to_itself() -> None:
    late = LateModel(Moved, CPU)
    seen = weakref.ref(late.loaded())
    vars(late.loaded())["itself"] = late.loaded()
    gc.disable()
    try:
        late.free()
        assert seen() is None
    finally:
        gc.enable()


def test_the_references_of_a_clip_move_the_autoencoder_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(make_config("data.cache.mode=write"))
    monkeypatch.setattr(run.wan.frozen.late_vae, "_is_parked", True)  # as on a GPU
    assert run.wan.frozen.vae
    to, places = AutoencoderKLWan.to, list[object]()

    def moving(vae: Any, place: object) -> Any:
        places.append(place)
        return to(vae, place)

    monkeypatch.setattr(AutoencoderKLWan, "to", moving)
    assert len(run.clips[0].references_KCHW)
    assert places == [CPU, CPU], "to its device and back"


@pytest.mark.parametrize(
    ("setting", "parked"), [("data.cache.mode=write", True), ("data.cache.latents=false", False)]
)
def test_the_autoencoder_is_parked_where_latents_are_kept(
    make_config: MakeConfig, setting: str, parked: bool
) -> None:
    assert build_run(make_config(setting)).wan.frozen.parks_vae == parked
