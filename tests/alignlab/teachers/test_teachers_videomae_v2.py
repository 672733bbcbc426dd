"""Original VideoMAE V2 folders: the converted model does what the original does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from alignlab.errors import UserError
from alignlab.teachers import TEACHERS, load_teacher

WIDTH, HEADS, DEPTH = 24, 2, 2
EPS = 1.0  # large enough to be seen
WEIGHTS = ("weight", "bias")
CONFIG: dict[str, Any] = {
    "img_size": 48,
    "patch_size": 16,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": 2,
    "qkv_bias": True,
    "layer_norm_eps": EPS,
    "init_values": 0.0,
    "use_learnable_pos_emb": False,
    "tubelet_size": 2,
    "use_mean_pooling": True,
    "num_frames": 4,
    "cos_attn": False,
}


def _weights() -> dict[str, Tensor]:
    """Random weights under the names of the original code."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (WIDTH, 3, 2, 16, 16),
        "patch_embed.proj.bias": (WIDTH,),
        "fc_norm.weight": (WIDTH,),
        "fc_norm.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        block = {
            **{f"{norm}.{kind}": (WIDTH,) for norm in ("norm1", "norm2") for kind in WEIGHTS},
            "attn.qkv.weight": (3 * WIDTH, WIDTH),
            "attn.q_bias": (WIDTH,),
            "attn.v_bias": (WIDTH,),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            "mlp.fc1.weight": (2 * WIDTH, WIDTH),
            "mlp.fc1.bias": (2 * WIDTH,),
            "mlp.fc2.weight": (WIDTH, 2 * WIDTH),
            "mlp.fc2.bias": (WIDTH,),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=rng) * 0.2 for name, shape in shapes.items()}


def _original(w: dict[str, Tensor], pixels_BCTHW: Tensor) -> Tensor:
    """The original's blocks, without its last norm, (B, L, D)."""
    x = F.conv3d(
        pixels_BCTHW, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=(2, 16, 16)
    )
    x = x.flatten(2).mT
    place, channel = torch.arange(x.shape[1])[:, None], torch.arange(WIDTH)[None]
    angle = place / 10000 ** (2 * (channel // 2) / WIDTH)
    x = x + torch.where(channel % 2 == 0, angle.sin(), angle.cos())
    for i in range(DEPTH):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items()}
        y = F.layer_norm(x, (WIDTH,), b["norm1.weight"], b["norm1.bias"], eps=EPS)
        bias = torch.cat([b["attn.q_bias"], torch.zeros(WIDTH), b["attn.v_bias"]])
        qkv = F.linear(y, b["attn.qkv.weight"], bias).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        y = (scores @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.layer_norm(x, (WIDTH,), b["norm2.weight"], b["norm2.bias"], eps=EPS)
        y = F.gelu(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + F.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return x


def _folder(path: Path, weights: dict[str, Tensor], **changes: Any) -> str:
    values = {"model_type": "VideoMAEv2_Base", "model_config": CONFIG | changes}
    (path / "config.json").write_text(json.dumps(values))
    save_file(weights, path / "model.safetensors")
    return str(path)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_features_are_those_of_the_original(tmp_path: Path, prefix: str) -> None:
    weights = _weights()
    named = {prefix + name: value for name, value in weights.items()}
    teacher = load_teacher("videomae", path=_folder(tmp_path, named))
    assert (teacher.dim, teacher.patch_size, teacher.tubelet) == (WIDTH, 16, 2)
    rng = torch.Generator().manual_seed(1)
    clips = torch.randint(0, 256, (2, 5, 48, 48, 3), generator=rng, dtype=torch.uint8)
    row = TEACHERS["videomae"]
    pixels = (clips[:, 1:] / 255.0 - torch.tensor(row.mean)) / torch.tensor(row.std)
    expected = _original(weights, pixels.permute(0, 4, 1, 2, 3)).unflatten(1, (2, 9))
    found = teacher.encode(clips, (3, 3))
    assert found.grid == (2, 3, 3)
    torch.testing.assert_close(found.tokens_BTPD, expected, rtol=1e-4, atol=1e-4)


def test_what_transformers_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cos_attn"):
        load_teacher("videomae", path=_folder(tmp_path, _weights(), cos_attn=True))
    with pytest.raises(UserError, match=r"lacks model_config\.depth"):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "VideoMAEv2_Base", "model_config": {"mlp_ratio": 4}})
        )
        load_teacher("videomae", path=str(tmp_path))
    weights = _weights()
    del weights["blocks.1.attn.qkv.weight"]
    with pytest.raises(UserError, match=r"lacks 3 weights, e.g. .*layer\.1.*\.key\.weight"):
        load_teacher("videomae", path=_folder(tmp_path, weights))
    deeper = _weights() | {"blocks.0.gamma_1": torch.ones(WIDTH)}
    with pytest.raises(UserError, match=r"does not know, e\.g\. .*gamma_1"):
        load_teacher("videomae", path=_folder(tmp_path, deeper))
