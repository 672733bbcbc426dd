"""Wan 2.2 TI2V-5B: 48 channels, tokens of 32 pixels, references that are clean at t = 0."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.export import export
from alignlab.models import wan as loading
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.wan import Wan, load_wan
from alignlab.recipe import load_run, recipe_hash
from alignlab.runs.checkpoint_folders import latest
from alignlab.sampling import sample_to_file
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.train import teacher_grid, train_stage1
from alignlab.train import train
from alignlab.training.setup import build_run
from run_contents import timeless_contents
from tiny_wan22 import write_ti2v

pytestmark = pytest.mark.usefixtures("shared_clips")

TrainUntil = Callable[[RunConfig, int], None]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ti2v(tmp_path_factory.mktemp("ti2v"))


def config_of(recipe_file: Path, model: Path, output: Path, *overrides: str) -> RunConfig:
    settings = [f"model.path={model}", f"output={output}", "data.size=[64,96]"]
    settings += ["objectives.ra.blocks=[0,1]", "model.reference_timestep=zero", "steps=3"]
    settings += ["checkpoint.every=2", "eval.sample_clips=1", "eval.generated_clips=0"]
    return load_run(recipe_file, [*settings, *overrides])


@pytest.fixture(scope="module")
def wan(ti2v: Path) -> Wan:
    return load_wan(str(ti2v))


@pytest.fixture(scope="module")
def run(ti2v: Path, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    return train(config_of(recipe_file, ti2v, tmp_path_factory.mktemp("trained")))


def test_it_trains_samples_and_exports_to_plain_diffusers(run: Path, tmp_path: Path) -> None:
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert metrics["cknna/block1"] is not None and "teacher_retrieval/block0" in metrics
    assert (run / "samples" / "0.mp4").is_file()
    assert sample_to_file(run, "a red circle", (), tmp_path / "clip.mp4", steps=2).is_file()
    out = export(run, tmp_path / "out")
    newest = latest(run / "checkpoints")
    assert newest is not None
    pipeline = WanPipeline.from_pretrained(out)
    assert pipeline.config.expand_timesteps and pipeline.transformer_2 is None
    for name, weights in load_file(newest / "transformer" / WEIGHTS).items():
        assert torch.equal(pipeline.transformer.state_dict()[name], weights)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        "a red circle", height=64, width=96, num_frames=5, num_inference_steps=2, output_type="pt"
    ).frames
    assert video.shape == (1, 5, 3, 64, 96) and bool(torch.isfinite(video).all())


def test_a_killed_run_of_larger_tokens_resumes_exactly(
    run: Path, ti2v: Path, recipe_file: Path, train_until: TrainUntil, tmp_path: Path
) -> None:
    config = config_of(recipe_file, ti2v, tmp_path)
    train_until(config, 2)
    again, expected = timeless_contents(train(config)), timeless_contents(run)
    exempt = (".writer", "recipe.yaml", "environment.json", "metrics.jsonl", "result.json")
    names = sorted(name for name in expected if name not in exempt)
    assert [name for name in names if again.get(name) != expected[name]] == []


def test_its_latents_are_the_pipelines(wan: Wan, ti2v: Path) -> None:
    rng = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (5, 64, 96, 3), generator=rng, dtype=torch.uint8)
    latents = wan.encode_video(video)
    assert latents.shape == (48, 2, 4, 6) and wan.latent_grid(5, 64, 96) == (2, 2, 3)
    vae = WanPipeline.from_pretrained(ti2v).vae
    mode = vae.encode(video.permute(3, 0, 1, 2)[None] / 127.5 - 1).latent_dist.mode()
    mean, std = (
        torch.tensor(x).view(1, 48, 1, 1, 1)
        for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    torch.testing.assert_close(latents[None] * std + mean, mode, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wan.encode_image(video[0]), latents[:, 0], rtol=1e-4, atol=1e-4)
    assert wan.decode(latents).shape == video.shape


def test_latent_statistics_of_another_number_of_channels_are_refused(
    ti2v: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(ti2v, tmp_path / "broken"))
    path = broken / "vae" / "config.json"
    settings = json.loads(path.read_text())
    del settings["latents_mean"]  # diffusers' default is Wan 2.1's 16 numbers
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"latents_mean .* each of 48 numbers \(z_dim\)"):
        load_wan(str(broken))


def test_a_size_for_smaller_tokens_is_refused_before_weights_are_read(
    ti2v: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "read_transformer", lambda *_: pytest.fail("read"))
    config = config_of(recipe_file, ti2v, tmp_path, "data.size=[64,112]")
    with pytest.raises(UserError, match=r"64x112 .* multiple of 32x32 .*nearest is \[64, 128\]"):
        build_run(config)


@pytest.mark.parametrize("kind", ["sara", "moalign"])
def test_stage_1_asks_the_teacher_for_the_tokens_of_its_model(
    kind: str, ti2v: Path, wan_folder: Path, teacher_folder: Path
) -> None:
    def grid(model: Path, **teacher: Any) -> tuple[int, int]:
        family = {"family": "dinov2", "path": str(teacher_folder), **teacher}
        settings = {
            "name": "s",
            "steps": 1,
            "model": {"path": str(model)},
            "data": {"name": "shapes", "size": [64, 96], "frames": 5},
            "teachers": {"dino": family},
            "stage1": {"kind": kind},
        }
        config = Stage1Config.model_validate(settings)
        assert Stage1Config.model_validate(config.model_dump()) == config
        return teacher_grid(config)

    assert (grid(ti2v), grid(wan_folder)) == ((2, 3), (4, 6))
    if kind == "sara":
        assert grid(ti2v, grid=[5, 5]) == (5, 5)
    else:
        with pytest.raises(ValidationError, match=r"nothing reads it .* a grid of its own"):
            grid(ti2v, grid=[5, 5])


def test_moaligns_stage_1_of_larger_tokens_is_read_by_its_stage_2(
    ti2v: Path, recipe_file: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    settings = {
        "name": "motion",
        "output": str(tmp_path),
        "steps": 1,
        "model": {"path": str(ti2v)},
        "data": {"name": "shapes", "size": [64, 96], "frames": 5, "train_clips": 4, "val_clips": 2},
        "teachers": {"dino": {"family": "dinov2", "path": str(teacher_folder)}},
        "stage1": {"kind": "moalign", "width": 8, "hidden": 8, "decoder": 8, "val_clips": 1},
        "optim": {"batch_size": 1},
        "tracking": {"mlflow": "none"},
    }
    network = train_stage1(Stage1Config.model_validate(settings))
    info = json.loads((network / "stage1.json").read_text())
    assert info["grid"] == [2, 3] and info["text"] is None
    objective = f"{{name: moalign, teacher: dino, blocks: [1], head: {network}}}"
    build_run(config_of(recipe_file, ti2v, tmp_path, f"objectives.motion={objective}"))


def test_clean_references_have_timestep_zero(wan: Wan) -> None:
    rng = torch.Generator().manual_seed(2)
    noisy, text = torch.randn(3, 48, 2, 4, 4, generator=rng), torch.randn(3, 7, 32, generator=rng)
    t_B = torch.tensor([700.0, 300.0, 300.0])
    references = [torch.randn(k, 48, 4, 4, generator=rng) for k in (2, 1, 0)]

    def velocity(at: Any, **more: Any) -> Tensor:
        with ReferenceBranch(wan.transformer, reference_timestep=at) as branch, torch.no_grad():
            return branch(noisy, t_B, text, references, **more).velocity_BCTHW

    def alone(i: int, video: Tensor) -> Tensor:
        """What diffusers' transformer makes of a sample whose tokens have these timesteps."""
        frames = torch.cat([noisy[i], references[i].transpose(0, 1)], dim=1)
        zeros = torch.zeros(len(references[i]) * 4)
        with ReferenceBranch(wan.transformer), torch.no_grad():
            for block in wan.transformer.blocks:  # video tokens alone attend to the text
                block.attn2.processor.num_video_tokens = 8
            out: Tensor = wan.transformer(
                hidden_states=frames[None],
                timestep=torch.cat([video, zeros])[None],
                encoder_hidden_states=text[i][None],
                return_dict=False,
            )[0]
        return out[0, :, :2]

    found = velocity("zero")
    for i in range(3):
        expected = alone(i, t_B[i].expand(8))
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
    plain = velocity("video")
    assert (found[:2] - plain[:2]).abs().amax((1, 2, 3, 4)).min() > 1e-3
    assert torch.equal(found[2], plain[2])  # without references it is one timestep, as before
    tokens_BN = torch.rand(3, 8, generator=rng) * 1000  # Self-Flow's two levels, and references
    mixed = velocity("zero", tokens_BN=tokens_BN)
    torch.testing.assert_close(mixed[0], alone(0, tokens_BN[0]), rtol=1e-4, atol=1e-5)


def test_settings_that_are_left_out_leave_the_identity(
    recipe_file: Path, ti2v: Path, tmp_path: Path
) -> None:
    base = load_run(recipe_file, [])
    named = load_run(recipe_file, ["model.reference_timestep=video", "model.expert=null"])
    assert recipe_hash(named) == recipe_hash(base)
    changes = ("model.reference_timestep=zero", "model.expert=high", "model.expert=low")
    assert (
        len({recipe_hash(load_run(recipe_file, [c])) for c in changes} | {recipe_hash(base)}) == 4
    )
    with pytest.raises(UserError, match=r"text_guidance_low: nothing reads it without model\.exp"):
        load_run(recipe_file, ["eval.text_guidance_low=3"])
