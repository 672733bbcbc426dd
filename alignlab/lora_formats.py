"""An exported LoRA in the keys of other programs: PEFT, ComfyUI, musubi-tuner.

They differ in how modules are called (diffusers has names of its own, the others those of Wan's
released code) and in where alpha is: in a file beside the weights, or a number beside each pair.
Facts read from diffusers 0.42 (`loaders/lora_conversion_utils.py`), PEFT 0.21, ComfyUI
(`comfy/lora.py`, `comfy/weight_adapter/lora.py`) and musubi-tuner (`convert_lora.py`).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from diffusers import WanTransformer3DModel
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from alignlab.errors import UserError
from alignlab.training.checkpoint import save_lora

LoraFormat = Literal["diffusers", "peft", "comfyui", "musubi"]

# Of diffusers' module names, in blocks and outside, what Wan's released code calls them.
_IN_BLOCK = {
    **{
        f"attn{number}.{ours}": f"{kind}_attn.{theirs}"
        for number, kind in ((1, "self"), (2, "cross"))
        for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}


def write_lora(
    transformer: WanTransformer3DModel, folder: Path, kind: LoraFormat, *, stem: str
) -> None:
    """Writes a transformer's adapter.

    Args:
        transformer: with the adapter `default`.
        folder: that there is.
        kind: `diffusers`: `pytorch_lora_weights.safetensors` (`load_lora_weights`); `peft`:
            `adapter_model.safetensors` and `adapter_config.json` (`PeftModel.from_pretrained`);
            `comfyui` and `musubi`: one file, with alpha beside each pair of matrices.
        stem: name of that file, without its ending.

    Raises:
        UserError: a module that the adapter changes has no name in Wan's released code.
    """
    if kind == "diffusers":
        save_lora(transformer, folder)
    elif kind == "peft":
        _write_peft(transformer, folder)
    else:
        renamed = {"comfyui": _comfyui, "musubi": _musubi}[kind]
        save_file(_with_alpha(transformer, renamed), folder / f"{stem}.safetensors")


def _write_peft(transformer: WanTransformer3DModel, folder: Path) -> None:
    weights = get_peft_model_state_dict(transformer)
    named = {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    transformer.peft_config["default"].save_pretrained(str(folder))


def _with_alpha(
    transformer: WanTransformer3DModel, renamed: Callable[[str, str], str]
) -> dict[str, Tensor]:
    """The weights by other names, and alpha beside each pair: without it a loader takes the rank.

    Args:
        transformer: with the adapter.
        renamed: gives a key from a module's name in Wan's code and what is kept of it: `down`, `up`
            or `alpha`.
    """
    alpha = float(transformer.peft_config["default"].lora_alpha)
    found: dict[str, Tensor] = {}
    for name, value in get_peft_model_state_dict(transformer).items():
        module, side = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()  # type: ignore[union-attr]
        theirs = _released_name(module)
        found[renamed(theirs, "down" if side == "A" else "up")] = value.contiguous()
        found[renamed(theirs, "alpha")] = torch.tensor(alpha)
    return found


def _comfyui(module: str, what: str) -> str:
    key = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}[what]
    return f"diffusion_model.{module}.{key}"


def _musubi(module: str, what: str) -> str:
    key = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}[what]
    return f"lora_unet_{module.replace('.', '_')}.{key}"


def _released_name(module: str) -> str:
    """What Wan's released code calls a module of diffusers' transformer."""
    block, _, inner = module.partition(".")[2].partition(".")
    if module.startswith("blocks.") and inner in _IN_BLOCK:
        return f"blocks.{block}.{_IN_BLOCK[inner]}"
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    raise UserError(
        f"{module}: Wan's released code has no module of this name, so ComfyUI and musubi-tuner "
        "cannot load a LoRA of it: export it with --format diffusers or peft"
    )
