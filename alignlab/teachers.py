"""Teachers: frozen vision foundation models that turn frames into patch features.

A family is a row of data; the code below serves them all.
Shape letters: B batch, T frames, P patches per frame, D width, H height, W width, C channels.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.config_data import unknown_name
from alignlab.errors import UserError
from alignlab.hub import local_folder
from alignlab.losses.objective import Features

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TeacherRow:
    """One family of teachers.

    Args:
        classes: transformers class by the `model_type` in the model's config.json.
        path: used when a recipe names none: hub id or shipped asset.
        feature: used when a recipe names none.
        mean, std: normalisation of pixels that were scaled to 0..1.
        class_tokens: tokens before the patches, besides the `num_register_tokens` that the
            model's config counts.
    """

    classes: dict[str, str]
    path: str
    feature: str
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    class_tokens: int = 1


_DINOV2 = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}

# Default features: REPA reads DINOv2 after its final norm, RefAlign's code DINOv3 before it.
TEACHERS: dict[str, TeacherRow] = {
    "dinov2": TeacherRow(_DINOV2, path="facebook/dinov2-base", feature="post_norm"),
    "dinov3": TeacherRow(
        {"dinov3_vit": "DINOv3ViTModel"},
        path="facebook/dinov3-vitl16-pretrain-lvd1689m",
        feature="pre_norm",
    ),
    "tiny-dino": TeacherRow(_DINOV2, path="assets/tiny-dino", feature="post_norm"),
}


class Teacher:
    """A frozen model with its preprocessing.

    Args:
        model: a transformers vision transformer that returns `hidden_states`.
        row: its family.
        feature: `pre_norm` (last block's output), `post_norm` (after the final norm) or `layer:k`
            (output of block k, counted from 0).
        slice_size: frames per forward pass; bounds memory, changes results by rounding at most.

    Raises:
        UserError: there is no such feature.
    """

    def __init__(self, model: Any, row: TeacherRow, feature: str, *, slice_size: int = 16) -> None:
        self._model = model
        self._row = row
        self._feature = feature
        self._slice_size = slice_size
        self._layer = _hidden_state_index(feature, int(model.config.num_hidden_layers))
        self._num_prefix = row.class_tokens + int(getattr(model.config, "num_register_tokens", 0))
        self.dim = int(model.config.hidden_size)
        self.patch_size = int(model.config.patch_size)

    @torch.no_grad()
    def encode(self, frames_BTHWC: Tensor, grid_HW: tuple[int, int]) -> Features:
        """Patch features of uint8 frames, fp32, on a grid of the asked size.

        Frames are resized to `grid * patch_size` pixels, so that the features need no
        interpolation: 480x832 frames for a 30x52 grid and patch 16 stay as they are (RefAlign),
        256x256 frames for 16x16 and patch 14 become 224x224 (REPA).
        """
        if frames_BTHWC.dtype != torch.uint8 or frames_BTHWC.ndim != 5:
            raise ValueError(
                f"expected uint8 (B, T, H, W, C) frames, got {frames_BTHWC.dtype} "
                f"{tuple(frames_BTHWC.shape)}"
            )
        batch, frames = frames_BTHWC.shape[:2]
        height, width = grid_HW
        slices = [
            self._encode_slice(images, (height * self.patch_size, width * self.patch_size))
            for images in torch.split(frames_BTHWC.flatten(0, 1), self._slice_size)
        ]
        tokens = torch.cat(slices).view(batch, frames, height * width, self.dim)
        return Features(tokens, (frames, height, width))

    def _encode_slice(self, images_NHWC: Tensor, size: tuple[int, int]) -> Tensor:
        device = self._model.device
        pixels = images_NHWC.to(device).permute(0, 3, 1, 2).float() / 255.0
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        mean = torch.tensor(self._row.mean, device=device).view(1, 3, 1, 1)
        std = torch.tensor(self._row.std, device=device).view(1, 3, 1, 1)
        with torch.autocast(device.type, enabled=False):
            out = self._model(
                pixel_values=((pixels - mean) / std).to(self._model.dtype),
                output_hidden_states=self._layer is not None,
            )
        # transformers keeps hidden_states[-1] from before the final norm for these models
        tokens_NPD: Tensor = (
            out.last_hidden_state if self._layer is None else out.hidden_states[self._layer]
        )
        return tokens_NPD[:, self._num_prefix :].float()


def load_teacher(
    family: str,
    *,
    path: str | None = None,
    feature: str | None = None,
    device: torch.device | str = "cpu",
    slice_size: int = 16,
) -> Teacher:
    """Loads a teacher: bf16 on a GPU, fp32 on a CPU.

    Args:
        family: row of `TEACHERS`.
        path: transformers folder, shipped asset or hub id; None takes the row's.
        feature: see `Teacher`; None takes the row's.
        device: where it runs.
        slice_size: frames per forward pass.

    Raises:
        UserError: no such family, folder or feature, or a model of another family.
    """
    import transformers

    if family not in TEACHERS:
        raise UserError(f"teachers: {unknown_name('family', family, TEACHERS)}")
    row = TEACHERS[family]
    folder = local_folder(
        path or row.path,
        setting=f"teachers ({family}) path",
        marker="config.json",
        patterns=["*.json", "*.safetensors"],
    )
    model_type = transformers.AutoConfig.from_pretrained(folder).model_type
    if model_type not in row.classes:
        raise UserError(
            f"teachers: {folder} holds a {model_type} model, family {family} loads "
            f"{', '.join(row.classes)}"
        )
    device = torch.device(device)
    try:
        model, info = getattr(transformers, row.classes[model_type]).from_pretrained(
            folder,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except OSError as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"teachers: cannot load {folder}: {reason}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("mask_token"))
    if missing:
        raise UserError(f"teachers: {folder} lacks {len(missing)} weights, e.g. {missing[0]}")
    model = model.to(device).requires_grad_(False).eval()
    return Teacher(model, row, feature or row.feature, slice_size=slice_size)


def _hidden_state_index(feature: str, num_layers: int) -> int | None:
    """Index into transformers' `hidden_states` (0 is the embedding), None for the final norm."""
    if feature == "post_norm":
        return None
    if feature == "pre_norm":
        return num_layers
    match = re.fullmatch(r"layer:(\d+)", feature)
    if match is None:
        raise UserError(f"teachers feature: {feature!r} is not pre_norm, post_norm or layer:k")
    if int(match[1]) >= num_layers:
        raise UserError(f"teachers feature: no {feature}; the model has 0 to {num_layers - 1}")
    return int(match[1]) + 1
