"""Loading Wan pipelines and encoding with their frozen parts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from alignlab.config.model import LoraConfig
from alignlab.errors import UserError
from alignlab.models.lora import add_lora
from alignlab.models.wan import Wan, load_wan

PROMPTS = ["a red  striped circle &amp; a square ", "a", ""]


@pytest.fixture(scope="module")
def wan(wan_folder: Path) -> Wan:
    return load_wan(str(wan_folder))


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (9, 32, 48, 3), generator=rng, dtype=torch.uint8)


def test_only_the_transformer_is_trainable(wan: Wan) -> None:
    assert all(p.requires_grad and p.dtype == torch.float32 for p in wan.transformer.parameters())
    for part in (wan.vae, wan.text_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())
    assert (wan.num_blocks, wan.student_dim) == (4, 48)


def test_text_embeddings_are_the_pipelines(wan: Wan, wan_folder: Path) -> None:
    pipeline = WanPipeline.from_pretrained(wan_folder)
    expected = pipeline.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=32
    )[0]
    text = wan.encode_text(PROMPTS)
    torch.testing.assert_close(text, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(text[1, 2:], torch.zeros_like(text[1, 2:]))  # "a" and the end token
    assert text[1, 1].abs().sum() > 0


def test_a_prompt_does_not_depend_on_its_neighbours(wan: Wan) -> None:
    together = wan.encode_text(PROMPTS)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert torch.equal(wan.encode_text([prompt])[0], row)


def test_latents_are_normalised_as_the_pipeline_denormalises(wan: Wan, video: torch.Tensor) -> None:
    latents = wan.encode_video(video)
    pixels = video.permute(3, 0, 1, 2)[None] / 127.5 - 1
    mode = wan.vae.encode(pixels).latent_dist.mode()
    # WanPipeline divides by 1/std and adds the mean before it decodes
    mean = torch.tensor(wan.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(wan.vae.config.latents_std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(latents[None] / inverse_std + mean, mode, rtol=1e-5, atol=1e-5)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, wan.encode_video(video))


def test_decoding_is_the_pipelines(wan: Wan, wan_folder: Path) -> None:
    latents = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    frames = wan.decode(latents)
    pipeline = WanPipeline.from_pretrained(wan_folder)
    pipeline.set_progress_bar_config(disable=True)
    mean = torch.tensor(wan.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(wan.vae.config.latents_std).view(1, -1, 1, 1, 1)
    decoded = pipeline.vae.decode(latents[None] * std + mean).sample
    expected = pipeline.video_processor.postprocess_video(decoded, output_type="pt")[0]
    assert frames.dtype == torch.uint8 and frames.shape == (9, 32, 48, 3)
    difference = frames / 255 - expected.permute(0, 2, 3, 1)
    assert difference.abs().max() <= 0.5 / 255 + 1e-6


def test_a_reference_image_is_a_clip_of_one_frame(wan: Wan, video: torch.Tensor) -> None:
    latents = wan.encode_image(video[0])
    assert latents.shape == (16, 4, 6)
    # the autoencoder is causal: the first latent frame of the clip saw the first frame alone
    torch.testing.assert_close(latents, wan.encode_video(video)[:, 0])


def test_encoders_ignore_autocast(wan: Wan, video: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        latents, text = wan.encode_video(video), wan.encode_text(["a red circle"])
    assert torch.equal(latents, wan.encode_video(video))
    assert torch.equal(text, wan.encode_text(["a red circle"]))


def test_latent_grid_is_the_grid_of_the_tokens(wan: Wan, video: torch.Tensor) -> None:
    grid = wan.latent_grid(9, 32, 48)
    latents = wan.encode_video(video)
    patches = wan.transformer.patch_embedding(latents[None])
    assert grid == tuple(patches.shape[2:]) == (3, 2, 3)


@pytest.mark.parametrize(("clip", "named"), [((8, 32, 48), "frames"), ((9, 40, 48), "size")])
def test_a_clip_that_does_not_fit_is_refused(
    wan: Wan, clip: tuple[int, int, int], named: str
) -> None:
    with pytest.raises(UserError, match=f"data.{named}"):
        wan.latent_grid(*clip)


def _run(wan: Wan) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        out: torch.Tensor = wan.transformer(
            hidden_states=torch.randn(1, 16, 2, 4, 4, generator=rng),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 16, 32, generator=rng),
            return_dict=False,
        )[0]
    return out


def test_lora_starts_as_the_base_model(wan: Wan, wan_folder: Path) -> None:
    adapted = load_wan(str(wan_folder), train="lora", lora=LoraConfig(rank=4))
    assert torch.equal(_run(adapted), _run(wan))
    trainable = [n for n, p in adapted.transformer.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 * 2 * 4 * 2  # blocks, attentions, default targets, A and B
    assert all("lora_" in name for name in trainable)


def test_lora_weights_depend_on_the_seed_alone(wan_folder: Path) -> None:
    def adapter(seed: int, drawn_before: int) -> list[torch.Tensor]:
        torch.manual_seed(drawn_before)
        settings = LoraConfig(rank=2, targets=("to_q",))
        loaded = load_wan(str(wan_folder), train="lora", lora=settings, seed=seed)
        return [p for p in loaded.transformer.parameters() if p.requires_grad]

    first, again, other = adapter(0, 1), adapter(0, 2), adapter(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_adding_a_lora_draws_nothing_from_global_state(wan_folder: Path) -> None:
    transformer = load_wan(str(wan_folder)).transformer
    before = torch.random.get_rng_state()
    add_lora(transformer, LoraConfig(rank=2), seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_lora_in_bf16_keeps_the_adapter_in_fp32(wan_folder: Path) -> None:
    adapted = load_wan(str(wan_folder), train="lora", lora=LoraConfig(rank=2), precision="bf16")
    for name, weight in adapted.transformer.named_parameters():
        if ".to_q." in name:
            assert weight.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    assert adapted.text_encoder.dtype == torch.bfloat16
    assert adapted.vae.dtype == torch.float32


def test_settings_reach_the_transformer(wan_folder: Path) -> None:
    wan = load_wan(str(wan_folder), gradient_checkpointing=True, attention="_native_math")
    assert wan.transformer.gradient_checkpointing
    assert wan.transformer.blocks[0].attn1.processor._attention_backend.value == "_native_math"


def _copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def test_folders_that_cannot_be_used_are_refused_in_one_line(
    wan_folder: Path, tmp_path: Path
) -> None:
    broken = _copy(wan_folder, tmp_path)
    with pytest.raises(UserError, match="no such folder") as missing:
        load_wan(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"no model_index\.json"):
        load_wan(str(broken / "vae"))
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["blocks.1.attn1.to_q.weight"]
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"lacks 1 weights, e.g. blocks.1.attn1.to_q.weight"):
        load_wan(str(broken))
    weights.unlink()
    with pytest.raises(UserError, match="cannot load") as no_weights:
        load_wan(str(broken))
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match="no vae/ folder"):
        load_wan(str(broken))
    assert all("\n" not in str(e.value) for e in (missing, no_weights))


def test_an_unreachable_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^model.path: nobody/no-such-wan is neither") as error:
        load_wan("nobody/no-such-wan")
    assert "\n" not in str(error.value)


def test_two_experts_are_refused(wan_folder: Path, tmp_path: Path) -> None:
    folder = _copy(wan_folder, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="two transformers"):
        load_wan(str(folder))


def test_a_lora_target_that_does_not_exist_is_named(wan_folder: Path) -> None:
    load_wan(str(wan_folder), train="lora", lora=LoraConfig(targets=("to_q", "net.0.proj")))
    with pytest.raises(UserError, match=r"'to_out', did you mean 'to_out.0'"):
        load_wan(str(wan_folder), train="lora", lora=LoraConfig(targets=("to_q", "to_out")))


def test_lora_settings_without_lora_training_are_refused(wan_folder: Path) -> None:
    with pytest.raises(ValueError, match="do not go together"):
        load_wan(str(wan_folder), train="full", lora=LoraConfig())
    with pytest.raises(ValueError, match="do not go together"):
        load_wan(str(wan_folder), train="lora")
