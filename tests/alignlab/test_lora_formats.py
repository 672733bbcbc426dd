"""A LoRA in the keys of other programs is the same model there; its alpha is not its rank."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from alignlab.config.model import LoraConfig
from alignlab.errors import UserError
from alignlab.export import export
from alignlab.lora_formats import LoraFormat, write_lora
from alignlab.models.lora import add_lora
from alignlab.models.wan import load_wan
from command_line import alignlab, refused

Write = Callable[[LoraFormat], Path]
RANK, ALPHA = 2, 6.0
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
OUTSIDE = ("proj_out", "time_proj", "linear_1", "linear_2")


@torch.no_grad()
def output(transformer: torch.nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(1, 16, 2, 6, 6, generator=draw),
        torch.randn(1, 8, 32, generator=draw),
    )
    timestep = torch.tensor([600.0])
    found: Tensor = transformer(latents, timestep, text, return_dict=False)[0]
    return found


def adapted(folder: Path, targets: tuple[str, ...]) -> WanTransformer3DModel:
    """A model whose adapter is far from nothing in every module."""
    model = load_wan(str(folder)).transformer
    add_lora(model, LoraConfig(rank=RANK, alpha=ALPHA, targets=targets), seed=0)
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0.0, 0.05, generator=draw)
    return model.eval()


@pytest.fixture(scope="module")
def trained(wan_folder: Path) -> WanTransformer3DModel:
    return adapted(wan_folder, TARGETS)


@pytest.fixture
def write(trained: WanTransformer3DModel, tmp_path: Path) -> Write:
    def written(kind: LoraFormat) -> Path:
        write_lora(trained, tmp_path, kind, stem="mine")
        return tmp_path

    return written


@pytest.mark.parametrize("kind", ["diffusers", "comfyui", "musubi"])
def test_diffusers_loads_it_as_the_same_model(
    kind: LoraFormat, write: Write, trained: WanTransformer3DModel, wan_folder: Path
) -> None:
    folder = write(kind)
    pipeline = WanPipeline.from_pretrained(wan_folder)
    base = output(pipeline.transformer)
    pipeline.load_lora_weights(folder, weight_name=next(folder.glob("*.safetensors")).name)
    torch.testing.assert_close(output(pipeline.transformer), output(trained), rtol=1e-4, atol=1e-5)
    assert (output(trained) - base).abs().max() > 0.01


def test_peft_loads_it_as_the_same_model(
    write: Write, trained: WanTransformer3DModel, wan_folder: Path
) -> None:
    loaded = PeftModel.from_pretrained(load_wan(str(wan_folder)).transformer, str(write("peft")))
    torch.testing.assert_close(output(loaded), output(trained), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["comfyui", "musubi"])
def test_comfyui_finds_every_module_and_adds_the_same_to_its_weights(
    kind: LoraFormat, wan_folder: Path, tmp_path: Path
) -> None:
    """By its rule: a weight gains alpha / rank times up times down; every key is used."""
    trained = adapted(wan_folder, TARGETS + OUTSIDE)
    write_lora(trained, tmp_path, kind, stem="mine")
    lora = load_file(tmp_path / "mine.safetensors")
    base = load_wan(str(wan_folder)).transformer
    sides = ("lora_B", "lora_A") if kind == "comfyui" else ("lora_up", "lora_down")
    released = released_names(base)
    for theirs, ours in released.items():
        module = theirs.removesuffix(".weight")
        key = f"diffusion_model.{module}"
        if kind == "musubi":  # ComfyUI knows both
            key = f"lora_unet_{module.replace('.', '_')}"
        if f"{key}.alpha" in lora:
            up, down = (lora.pop(f"{key}.{side}.weight") for side in sides)
            scale = lora.pop(f"{key}.alpha").item() / len(down)
            base.get_parameter(ours).data += scale * up @ down
    assert not lora, "keys that nothing has loaded"
    torch.testing.assert_close(output(base), output(trained), rtol=1e-4, atol=1e-5)


def released_names(model: WanTransformer3DModel) -> dict[str, str]:
    """Wan's released names of all weights, as diffusers knows them, and diffusers' own."""
    blocks = len(model.blocks)
    names = [
        *(
            f"blocks.{i}.{a}_attn.{m}"
            for i in range(blocks)
            for a in ("self", "cross")
            for m in "qkvo"
        ),
        *(f"blocks.{i}.ffn.{layer}" for i in range(blocks) for layer in (0, 2)),
        *(f"{kind}_embedding.{layer}" for kind in ("time", "text") for layer in (0, 2)),
        *("time_projection.1", "head.head"),
    ]
    found = {}
    for name in names:
        (ours,) = convert_wan_transformer_to_diffusers({f"{name}.weight": torch.zeros(1)})
        found[f"{name}.weight"] = ours
    return found


def test_a_module_without_a_released_name_is_refused(wan_folder: Path, tmp_path: Path) -> None:
    model = adapted(wan_folder, ("to_q",))
    model.blocks[0].odd = torch.nn.Linear(2, 2)
    model.delete_adapters("default")
    add_lora(model, LoraConfig(rank=1, targets=("odd",)), seed=0)
    with pytest.raises(UserError, match=r"blocks\.0\.odd: Wan's released code has no module"):
        write_lora(model, tmp_path, "comfyui", stem="mine")
    write_lora(model, tmp_path, "peft", stem="mine")


def test_the_command_writes_beside_the_other_export(
    lora_run: Path, full_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(lora_run, tmp_path / lora_run.name)
    done = alignlab("export", run, "--format", "comfyui")
    assert done.exit_code == 0, done.output
    found = {path.name for path in (run / "export-comfyui").iterdir()}
    assert found == {"model_card.md", f"{lora_run.name}.safetensors"}
    assert export(run, kind="comfyui") == run / "export-comfyui", "it may be made again"
    card = (run / "export-comfyui" / "model_card.md").read_text()
    assert "models/loras" in card and "load_lora_weights" not in card
    line = refused("export", full_run, "--format", "musubi")
    assert line.startswith("error: --format musubi is for a LoRA")
