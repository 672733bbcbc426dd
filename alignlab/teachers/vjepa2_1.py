"""V-JEPA 2.1's encoder, which transformers lacks, from Meta's checkpoints.

What differs from V-JEPA 2.0, established from Meta's code (facebookresearch/vjepa2,
`app/vjepa_2_1`) and checked by running it on the same weights:

- Rotary angles: the two channels of a pair share an angle. In 2.0, and so in transformers, angles
  were tiled, so that the channels of a pair were turned by different ones.
- Rows and columns are counted in units of the grid of 256 pixels: on H rows, row r stands at
  r (G - 1) / (H - 1), with G = 16 for patches of 16 pixels. Frames are counted as they are.
- A vector is added to all tokens that says whether they are of a video or of an image; an image has
  a patch embedding of its own, over one frame.
- Four blocks have a final norm each, the last block among them; there is no other final norm.

Shape letters: N clips, T frames, C channels, H and W pixels of a frame, L tokens, D width,
A heads, K channels of a head; t, h, w tokens along each axis.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.errors import UserError

MODEL_TYPE = "vjepa2_1"
ENCODERS = ("ema_encoder", "target_encoder")
"""Where checkpoints keep the encoder that Meta's code loads: distilled ones (ViT-B, ViT-L) in the
first, in which the second, if there is one, is the model that they were distilled from."""
HEAD_DIM = 64
"""Channels of a head in all four models, which the weights do not tell."""
NORMED_BLOCKS = {
    12: (2, 5, 8, 11),
    24: (5, 11, 17, 23),
    40: (9, 19, 29, 39),
    48: (11, 23, 37, 47),
}
"""Blocks with a norm of their own, by the number of blocks."""
TRAINED_PIXELS = {14: 252, 16: 256}
"""Side of the images whose grid rows and columns are counted in, by the patch size."""
EPS = 1e-6


@dataclass(frozen=True)
class Vjepa21Config:
    """What a checkpoint's weights say of their model.

    Args:
        hidden_size: width D of the tokens.
        num_hidden_layers: blocks.
        num_attention_heads: heads.
        intermediate_size: width inside a block's MLP.
        patch_size: pixels.
        tubelet_size: frames per token of a video.
        norm_layers: blocks with a norm of their own.
        takes_images: there is a patch embedding for single frames.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int
    tubelet_size: int
    norm_layers: tuple[int, ...]
    takes_images: bool
    model_type: str = MODEL_TYPE


class Vjepa21Output(NamedTuple):
    """What the encoder gives; (N, L, D) each.

    Args:
        last_hidden_state: after the last block's norm.
        hidden_states: the embedding, then each block's output as it is.
        intermediate_hidden_states: outputs of the blocks that have a norm, after it.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] = ()
    intermediate_hidden_states: tuple[Tensor, ...] = ()


def encoder_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoder's weights in a checkpoint, by the names that `Vjepa21Model` has for them.

    Args:
        checkpoint: what the file holds.

    Raises:
        ValueError: it holds no encoder of V-JEPA 2.1.
    """
    holds = next((key for key in ENCODERS if isinstance(checkpoint.get(key), Mapping)), None)
    if holds is None:
        raise ValueError(f"holds neither {' nor '.join(ENCODERS)}: no checkpoint of V-JEPA 2.1")
    weights = {
        re.sub(r"^(module\.|backbone\.)+", "", name): value
        for name, value in checkpoint[holds].items()
        if isinstance(value, Tensor)
    }
    if not any(name.startswith("norms_block.") for name in weights):
        raise ValueError(
            "has no norms_block, so it is no V-JEPA 2.1: V-JEPA 2.0 is loaded from a transformers "
            "folder, such as facebook/vjepa2-vitg-fpc64-384"
        )
    return weights


def read_config(weights: Mapping[str, Tensor]) -> Vjepa21Config:
    """The settings that the shapes of the weights tell.

    Raises:
        ValueError: they are not those of a V-JEPA 2.1 that is known here.
    """
    needed = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"lacks {missing[0]}")
    if weights[needed[0]].ndim != 5:
        raise ValueError("embeds single frames alone: no V-JEPA 2.1")
    width, _, tubelet, patch, _ = weights[needed[0]].shape
    numbers = (re.match(r"blocks\.(\d+)\.", name) for name in weights)
    depth = 1 + max(int(number[1]) for number in numbers if number)
    if depth not in NORMED_BLOCKS:
        known = ", ".join(map(str, NORMED_BLOCKS))
        raise ValueError(f"has {depth} blocks; models of {known} are known")
    if width % HEAD_DIM:
        raise ValueError(f"is {width} wide, which is no multiple of {HEAD_DIM}, a head's width")
    if patch not in TRAINED_PIXELS:
        known = ", ".join(map(str, TRAINED_PIXELS))
        raise ValueError(f"has patches of {patch} pixels; {known} are known")
    return Vjepa21Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_DIM,
        intermediate_size=weights[needed[2]].shape[0],
        patch_size=patch,
        tubelet_size=tubelet,
        norm_layers=NORMED_BLOCKS[depth],
        takes_images="patch_embed_img.proj.weight" in weights,
    )


class _PatchEmbed(nn.Module):
    def __init__(self, width: int, frames: int, patch: int) -> None:
        super().__init__()
        size = (frames, patch, patch)
        self.proj = nn.Conv3d(3, width, kernel_size=size, stride=size)

    def forward(self, pixels_NCTHW: Tensor) -> Tensor:
        tokens_NDthw: Tensor = self.proj(pixels_NCTHW)
        return tokens_NDthw


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_NLD: Tensor, turn: "_Turn") -> Tensor:
        qkv_N3ALK = self.qkv(x_NLD).unflatten(2, (3, self.heads, -1)).movedim(1, 3)
        query, key, value = qkv_N3ALK.unbind(1)
        mixed_NALK = F.scaled_dot_product_attention(turn(query), turn(key), value)
        out_NLD: Tensor = self.proj(mixed_NALK.transpose(1, 2).flatten(2))
        return out_NLD


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x_NLD: Tensor) -> Tensor:
        out_NLD: Tensor = self.fc2(F.gelu(self.fc1(x_NLD)))
        return out_NLD


class _Block(nn.Module):
    def __init__(self, config: Vjepa21Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = _Attention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = _Mlp(width, config.intermediate_size)

    def forward(self, x_NLD: Tensor, turn: "_Turn") -> Tensor:
        x_NLD = x_NLD + self.attn(self.norm1(x_NLD), turn)
        out_NLD: Tensor = x_NLD + self.mlp(self.norm2(x_NLD))
        return out_NLD


class _Turn:
    """Turns queries and keys by the places of their tokens; the same for all blocks.

    A head's channels are split into three equal parts, for frame, row and column; what is left over
    at the end is not turned.
    """

    def __init__(self, grid_thw: tuple[int, int, int], head_dim: int, patch: int) -> None:
        part = head_dim // 3 // 2 * 2
        self._turned = 3 * part
        speed = 1 / 10000 ** (torch.arange(part // 2) / (part / 2))
        angles_Lj = [place_L[:, None] * speed for place_L in _places(grid_thw, patch)]
        angles_LJ = torch.cat(angles_Lj, dim=1)
        self._cos, self._sin = angles_LJ.cos(), angles_LJ.sin()

    def to(self, like: Tensor) -> "_Turn":
        # fp32 whatever the model's dtype: bf16 would round angles to whole turns
        self._cos, self._sin = self._cos.to(like.device), self._sin.to(like.device)
        return self

    def __call__(self, x_NALK: Tensor) -> Tensor:
        pairs_NALJ2 = x_NALK[..., : self._turned].unflatten(-1, (-1, 2)).float()
        first, second = pairs_NALJ2.unbind(-1)
        turned = torch.stack(
            (first * self._cos - second * self._sin, second * self._cos + first * self._sin), dim=-1
        )
        rest = x_NALK[..., self._turned :]
        return torch.cat((turned.flatten(-2).to(x_NALK.dtype), rest), dim=-1)


def _places(grid_thw: tuple[int, int, int], patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column of every token, (L,) each."""
    frames, height, width = grid_thw
    if min(height, width) < 2:
        raise UserError(
            f"teachers (vjepa2): V-JEPA 2.1 has no positions on a grid of {height}x{width} "
            "patches: set teachers.<alias>.grid to 2 or more on both sides"
        )
    last = TRAINED_PIXELS[patch] // patch - 1
    number = torch.arange(frames * height * width)
    frame = (number // (height * width)).float()
    row = (number // width % height).float()
    column = (number % width).float()
    return frame, row * last / (height - 1), column * last / (width - 1)


class Vjepa21Model(nn.Module):
    """The encoder; without its weights until `load_state_dict` gives it some.

    Args:
        config: its shape.
    """

    def __init__(self, config: Vjepa21Config) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embed = _PatchEmbed(width, config.tubelet_size, config.patch_size)
        self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, width))
        if config.takes_images:
            self.patch_embed_img = _PatchEmbed(width, 1, config.patch_size)
            self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.norms_block = nn.ModuleList(nn.LayerNorm(width, eps=EPS) for _ in config.norm_layers)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.video_mod_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.video_mod_embed.dtype

    def forward(
        self,
        pixel_values_videos: Tensor,
        *,
        output_hidden_states: bool = False,
        skip_predictor: bool = True,
    ) -> Vjepa21Output:
        """Tokens of clips, or of single frames as images.

        Args:
            pixel_values_videos: (N, T, C, H, W), normalised.
            output_hidden_states: give those of all blocks.
            skip_predictor: there is none, so that nothing else is possible.
        """
        if not skip_predictor:
            raise ValueError("there is no predictor")
        pixels_NCTHW = pixel_values_videos.transpose(1, 2)
        if self.config.takes_images and pixels_NCTHW.shape[2] == 1:
            embed, kind = self.patch_embed_img, self.img_mod_embed
        else:
            embed, kind = self.patch_embed, self.video_mod_embed
        x_NDthw = embed(pixels_NCTHW)
        _, width, frames, rows, columns = x_NDthw.shape
        head_dim = width // self.config.num_attention_heads
        turn = _Turn((frames, rows, columns), head_dim, self.config.patch_size).to(x_NDthw)
        x_NLD = x_NDthw.flatten(2).mT + kind
        states = [x_NLD]
        normed = []
        for number, block in enumerate(self.blocks):
            x_NLD = block(x_NLD, turn)
            if output_hidden_states:
                states.append(x_NLD)
            if output_hidden_states and number in self.config.norm_layers:
                norm = self.norms_block[self.config.norm_layers.index(number)]
                normed.append(norm(x_NLD))
        last_NLD = self.norms_block[-1](x_NLD)
        if not output_hidden_states:
            return Vjepa21Output(last_NLD)
        return Vjepa21Output(last_NLD, tuple(states), tuple(normed))


def empty_model(config: Vjepa21Config) -> Vjepa21Model:
    """The encoder on the device meta, for `load_state_dict(..., assign=True)`."""
    with torch.device("meta"):
        return Vjepa21Model(config)
