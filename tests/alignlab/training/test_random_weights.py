"""A run whose transformer begins with random weights (`model.init: random`)."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.experiments.compare.config import differing_settings
from alignlab.export import export
from alignlab.models.wan import load_wan
from alignlab.randomness import derive_seed
from alignlab.recipe import recipe_hash
from alignlab.runs.inputs import read_inputs
from alignlab.train import train
from alignlab.training.setup import build_run
from command_line import refused
from run_contents import timeless_contents
from tiny_runs import MakeConfig, TrainUntil

RANDOM = "model.init=random"


def drawn(folder: Path, seed: int) -> dict[str, Tensor]:
    return dict(load_wan(str(folder), init="random", seed=seed).transformer.state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_they_are_diffusers_own_and_follow_from_the_seed_alone(wan_folder: Path) -> None:
    torch.manual_seed(1)
    first = drawn(wan_folder, 0)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = drawn(wan_folder, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert equal(first, again) and not equal(first, drawn(wan_folder, 1))

    settings = json.loads((wan_folder / "transformer" / "config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(0, "transformer"))
        expected = WanTransformer3DModel.from_config(settings)
    assert equal(first, expected.state_dict())
    trained = load_wan(str(wan_folder)).transformer
    assert not torch.equal(first["patch_embedding.weight"], trained.patch_embedding.weight)


def test_variants_of_a_seed_start_alike(make_config: MakeConfig) -> None:
    """Whatever objectives, projectors and memory savings a variant has."""

    def start(*settings: str, aligned: bool = True) -> dict[str, Tensor]:
        run = build_run(make_config(RANDOM, "data.cache.mode=off", *settings, aligned=aligned))
        return dict(run.wan.transformer.state_dict())

    plain = start(aligned=False)
    repa = "objectives.p={name: repa, teacher: dino, blocks: [1], projector_dim: 16}"
    assert equal(plain, start(repa, "model.gradient_checkpointing=true", "optim.ema=0.9"))
    assert not equal(plain, start("seed=1", aligned=False))


def test_the_folders_weights_are_not_read(
    make_config: MakeConfig, wan_folder: Path, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(wan_folder, tmp_path / "bare"))
    (bare / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert equal(drawn(bare, 0), drawn(wan_folder, 0))
    inputs = {one.name: one.files for one in read_inputs(make_config(RANDOM), fetch=True)}
    assert set(inputs["model/transformer"]) == {"config.json"}


def test_it_is_part_of_what_a_run_is(make_config: MakeConfig) -> None:
    trained, random = make_config(), make_config(RANDOM)
    assert recipe_hash(trained) == recipe_hash(make_config("model.init=trained"))
    assert recipe_hash(trained) != recipe_hash(random)
    runs: dict[str, RunConfig] = {"a": trained, "b": random}
    assert differing_settings(runs)["model.init"] == {"a": "trained", "b": "random"}


def test_it_resumes_exactly_and_is_exported(
    make_config: MakeConfig,
    train_until: TrainUntil,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = (RANDOM, "steps=3", "checkpoint.every=1", "eval.clips=1")
    whole = train(make_config(*settings, f"output={tmp_path / 'whole'}"))
    config = make_config(*settings, f"output={tmp_path / 'killed'}")
    train_until(config, 2)
    resumed = train(config)
    one, two = (timeless_contents(run / "checkpoints") for run in (whole, resumed))
    assert one == two and any("step-000003" in name for name in one)

    with caplog.at_level(logging.INFO):
        out = export(whole, tmp_path / "out")
    assert "trained from random weights (model.init: random)" in caplog.text
    exported = WanPipeline.from_pretrained(out).transformer.state_dict()
    kept = whole / "checkpoints" / "step-000003" / "transformer"
    assert equal(exported, WanTransformer3DModel.from_pretrained(kept).state_dict())


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "model.train=lora",
            "model: random weights need train: full, since a LoRA leaves them as they are; set it, "
            "or remove init: random\n",
        ),
        (
            "model.init_from=runs/first",
            "model: init_from would replace the weights that init: random draws; remove one of the "
            "two\n",
        ),
    ],
)
def test_what_random_weights_do_not_go_with(
    recipe_file: Path, tmp_path: Path, setting: str, expected: str
) -> None:
    assert expected in refused("train", recipe_file, f"output={tmp_path}", RANDOM, setting)


def test_settings_that_make_no_transformer(
    recipe_file: Path, wan_folder: Path, tmp_path: Path
) -> None:
    odd = Path(shutil.copytree(wan_folder, tmp_path / "odd"))
    config = odd / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": "many"}))
    line = refused("train", recipe_file, f"output={tmp_path}", RANDOM, f"model.path={odd}")
    assert f"model.path: cannot build {odd / 'transformer'}" in line
