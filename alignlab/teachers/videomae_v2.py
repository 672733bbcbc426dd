"""Original VideoMAE V2 folders, as VideoREPA's teacher comes, for transformers' VideoMAE."""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from alignlab.errors import UserError

MODEL_TYPES = ("VideoMAEv2_Base",)
# transformers' VideoMAE has none of these
UNSUPPORTED = ("cos_attn", "init_values", "use_learnable_pos_emb")

# transformers' name -> original name
SETTINGS = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "num_frames": "num_frames",
    "tubelet_size": "tubelet_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "qv_bias": "qkv_bias",
    "layer_norm_eps": "layer_norm_eps",
    "use_mean_pooling": "use_mean_pooling",
}
RENAMED = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.q_bias$", ".attention.attention.query.bias"),
    (r"\.attn\.v_bias$", ".attention.attention.value.bias"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def config_values(config: dict[str, Any]) -> dict[str, Any]:
    """Translates an original config.json to settings of a `VideoMAEConfig`.

    Raises:
        UserError: the model has a part that transformers' class lacks.
    """
    values = config.get("model_config", {})
    missing = sorted({"mlp_ratio", *SETTINGS.values()} - values.keys())
    if missing:
        raise UserError(
            f"teachers: config.json of this VideoMAE V2 lacks model_config.{missing[0]}"
        )
    for key in UNSUPPORTED:
        if values.get(key):
            raise UserError(f"teachers: this VideoMAE V2 has {key}, which transformers lacks")
    width = int(values["embed_dim"] * values["mlp_ratio"])
    return {ours: values[theirs] for ours, theirs in SETTINGS.items()} | {
        "intermediate_size": width
    }


def weights(folder: Path) -> dict[str, Tensor]:
    """Reads the folder's weights under transformers' names."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            tensors |= _renamed(name.removeprefix("model."), value)
    return tensors


def _renamed(name: str, value: Tensor) -> dict[str, Tensor]:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    if not name.endswith(".attn.qkv.weight"):
        return {name: value}
    stem = name.removesuffix(".attn.qkv.weight") + ".attention.attention"
    parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
    return {f"{stem}.{part}.weight": rows.contiguous() for part, rows in parts}
