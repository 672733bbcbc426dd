"""A Wan text-to-video model, loaded from a diffusers pipeline folder.

Shape letters: B batch, C channels, T frames, H height, W width, L text tokens, D width.
`T`, `H`, `W` count pixels for uint8 tensors and latent cells for latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from alignlab.config.data import LATENT_STRIDE, SIZE_STEP
from alignlab.config.model import (
    Expert,
    GradientCheckpointing,
    Init,
    LoraConfig,
    TextEncoderPlace,
    blocks_apart,
)
from alignlab.config.optim import WeightsType
from alignlab.errors import UserError
from alignlab.losses.objective import Grid
from alignlab.models.attention_backends import check_backend
from alignlab.models.compiled_blocks import compile_blocks
from alignlab.models.experts import INDEX, check_index, transformer_part
from alignlab.models.frozen_parts import FrozenParts
from alignlab.models.gradient_checkpointing import check_blocks_apart, checkpoint_blocks
from alignlab.models.lora import add_lora
from alignlab.models.model_files import (
    check_model_files,
    construct,
    local_folder,
    read_object,
)
from alignlab.models.pipeline_parts import (
    COMPONENTS,
    FROZEN,
    PART_FILES,
    TEXT_PARTS,
    check_part,
    load_part,
)
from alignlab.models.text_encoder import TextEncoder
from alignlab.randomness import global_draws


@dataclass(frozen=True)
class Wan:
    """The parts of a Wan pipeline; everything but the transformer is frozen.

    Args:
        transformer: what is trained; all its weights, or a frozen base with a fp32 LoRA.
        frozen: autoencoder and text encoder, loaded when they are needed.
        part: sub-folder that the transformer came from; an export replaces it.
    """

    transformer: WanTransformer3DModel
    frozen: FrozenParts
    part: str = "transformer"

    @property
    def folder(self) -> Path:
        """Where the parts came from; an export copies the frozen ones from here."""
        return self.frozen.folder

    @property
    def device(self) -> torch.device:
        return self.frozen.device

    @property
    def vae(self) -> AutoencoderKLWan:
        """The autoencoder, in fp32."""
        return self.frozen.vae

    @property
    def text(self) -> TextEncoder:
        """The frozen text encoder with its tokenizer."""
        return self.frozen.text

    @property
    def text_encoder(self) -> UMT5EncoderModel:
        """The text encoder's model, in the recipe's precision."""
        return self.frozen.text.late_model.loaded()

    @property
    def num_blocks(self) -> int:
        return int(self.transformer.config["num_layers"])

    @property
    def student_dim(self) -> int:
        """Width of the tokens that a tap captures."""
        config = self.transformer.config
        return int(config["num_attention_heads"] * config["attention_head_dim"])

    def latent_grid(self, frames: int, height: int, width: int) -> Grid:
        """The video token grid (T, H, W) of a clip of so many frames and pixels.

        Raises:
            UserError: the clip does not fit the strides of the autoencoder and the patches.
        """
        patch = self.transformer.config["patch_size"]
        return self.frozen.token_grid(patch, frames, height, width)

    def encode_video(self, video_THWC: Tensor) -> Tensor:
        """uint8 frames to latents: see `FrozenParts`, here and below."""
        return self.frozen.encode_video(video_THWC)

    def encode_image(self, image_HWC: Tensor) -> Tensor:
        """A uint8 image to latents."""
        return self.frozen.encode_image(image_HWC)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to embeddings."""
        return self.frozen.encode_text(prompts)

    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """Latents to uint8 frames."""
        return self.frozen.decode(latents_CTHW)


def load_wan(
    path: str,
    *,
    expert: Expert | None = None,
    train: Literal["full", "lora"] = "full",
    lora: LoraConfig | None = None,
    attention: str = "native",
    gradient_checkpointing: GradientCheckpointing = False,
    compiled: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    weights: WeightsType = "fp32",
    device: torch.device | str = "cpu",
    transformer_device: torch.device | str | None = None,
    seed: int = 0,
    init: Init = "trained",
    text_encoder: TextEncoderPlace = "auto",
    parks_vae: bool = False,
    frozen: FrozenParts | None = None,
    load_frozen: bool = True,
    clip: tuple[int, int, int] | None = None,
) -> Wan:
    """Loads a diffusers Wan pipeline for training.

    Args:
        path, expert: pipeline folder (laid out as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`) or hub id,
            and of one with two transformers (Wan 2.2 A14B) the one to load.
        train, lora: `full` trains every weight; `lora` an adapter, of weights that it freezes.
        attention: any diffusers attention backend that can train a Wan block on `device`.
        gradient_checkpointing, compiled: of the blocks, as the modules of these names say.
        precision: of the frozen weights: the text encoder and, with `lora`, the transformer.
        weights: of the transformer that `full` trains; `bf16` leaves in fp32 what diffusers does.
        device, transformer_device: where everything goes, and the transformer if elsewhere.
        init, seed: `random` draws the weights by config.json alone; of that, and of the adapter.
        text_encoder, parks_vae: see `FrozenParts`.
        frozen: autoencoder and text encoder of an earlier model: taken if they are the same.
        load_frozen: load both now; else when they are first needed.
        clip: frames, height and width that are to be trained: refused before weights are loaded.

    Raises:
        UserError: path, `clip`, a LoRA target, the backend or k of `every:k` cannot be used,
            or blocks cannot be compiled for `device`.
    """
    if (lora is None) != (train == "full"):
        raise ValueError(f"train={train!r} and lora={lora!r} do not go together")
    folder, part = checked_pipeline(path, expert), transformer_part(expert)
    places: dict[str, Any] = {"text_encoder": text_encoder, "parks_vae": parks_vae}
    own = frozen_parts(folder, precision=precision, device=device, **places)
    _check_architecture(folder / part, own, clip, gradient_checkpointing)
    transformer = _initial(folder, part, init, kept_in(precision, train, weights), seed)
    how: dict[str, Any] = {"precision": precision, "train": train, "weights": weights}
    how |= {"gradient_checkpointing": gradient_checkpointing}
    check_backend(attention, device, head_dim=transformer.config["attention_head_dim"], **how)
    frozen = frozen if frozen is not None and frozen.is_same(own) else own
    _check_text_to_video(transformer, frozen, path)
    if load_frozen:
        frozen.load()
    prepare(transformer, lora, seed, attention, gradient_checkpointing, compiled)
    return Wan(transformer.to(transformer_device or device).train(), frozen, part)


def _check_architecture(
    transformer: Path,
    frozen: FrozenParts,
    clip: tuple[int, int, int] | None,
    gradient_checkpointing: GradientCheckpointing,
) -> None:
    """Refuses by the settings of the models what their weights are not needed for."""
    if blocks_apart(gradient_checkpointing) is not None:
        check_blocks_apart(gradient_checkpointing, num_blocks(transformer))
    if clip is not None:
        frozen.token_grid(patch_size(transformer), *clip)


def prepare(
    transformer: WanTransformer3DModel,
    lora: LoraConfig | None,
    seed: int,
    attention: str,
    gradient_checkpointing: GradientCheckpointing,
    compiled: bool,
) -> None:
    """Adds to a transformer what a run trains it with; see `load_wan`."""
    if lora is not None:
        add_lora(transformer, lora, seed=seed)
    keep_ops = compiled and gradient_checkpointing == "ops"
    checkpoint_blocks(transformer, False if keep_ops else gradient_checkpointing)
    transformer.set_attention_backend(attention)
    if compiled:
        compile_blocks(transformer, keep_ops=keep_ops)


def read_transformer(folder: Path, part: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """A transformer of a pipeline folder, on the CPU, with weights that are finite and not all 0.

    Args:
        folder: of the pipeline.
        part: its sub-folder.
        dtype: of the weights.

    Raises:
        UserError: its files cannot be used.
    """
    transformer: WanTransformer3DModel = load_part(
        WanTransformer3DModel, folder, part, torch_dtype=dtype
    )
    check_part(folder, part, transformer)
    return transformer


def kept_in(
    precision: WeightsType, train: Literal["full", "lora"], weights: WeightsType
) -> WeightsType:
    """What the transformer keeps its weights in: those that a LoRA freezes, or that are trained."""
    return precision if train == "lora" else weights


def _initial(
    folder: Path, part: str, init: Init, kept: WeightsType, seed: int
) -> WanTransformer3DModel:
    """The weights that a training begins with, on the CPU."""
    dtype = torch.bfloat16 if kept == "bf16" else torch.float32
    if init == "random":
        return _drawn(folder, part, seed, dtype)
    return read_transformer(folder, part, dtype)


def _drawn(folder: Path, part: str, seed: int, dtype: torch.dtype) -> WanTransformer3DModel:
    """The folder's architecture with diffusers' initial weights, drawn in fp32.

    They are drawn on the CPU from `seed` alone, whatever else is drawn and whatever device trains
    them: the variants of a comparison start from equal ones, and so do the ranks of a run.
    """
    with global_draws(seed, "transformer"):
        transformer: WanTransformer3DModel = construct(
            WanTransformer3DModel, folder / part, setting="model.path"
        )
    if dtype != torch.float32:
        keep_in(transformer, dtype)
    return transformer


def keep_in(transformer: WanTransformer3DModel, dtype: torch.dtype) -> None:
    """Rounds weights to `dtype`, as diffusers loads them: all but those that it keeps in fp32."""
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def frozen_parts(
    folder: Path,
    *,
    precision: Literal["fp32", "bf16"],
    device: torch.device | str,
    text_encoder: TextEncoderPlace = "auto",
    parks_vae: bool = False,
) -> FrozenParts:
    """The frozen encoders of a pipeline folder; nothing is loaded yet.

    Args:
        folder: see `checked_pipeline`.
        precision: of the text encoder.
        device: where they run.
        text_encoder, parks_vae: see `FrozenParts`.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return FrozenParts(folder, dtype, torch.device(device), text_encoder, parks_vae)


def patch_size(transformer: Path) -> tuple[int, int, int]:
    """Latent cells (T, H, W) of a token, of a transformer's settings; its weights are not read.

    Args:
        transformer: its folder.

    Raises:
        UserError: the settings are damaged.
    """
    path = transformer / "config.json"
    found = read_object(path, setting="model.path").get("patch_size", (1, 2, 2))
    is_list = isinstance(found, list | tuple) and len(found) == 3
    if not is_list or any(type(side) is not int or side < 1 for side in found):
        raise UserError(f"model.path: {path}: patch_size is no list of three whole numbers")
    return found[0], found[1], found[2]


def num_blocks(transformer: Path) -> int:
    """Of a transformer's settings; its weights are not read.

    Args:
        transformer: its folder.

    Raises:
        UserError: the settings are damaged.
    """
    path = transformer / "config.json"
    found = read_object(path, setting="model.path").get("num_layers", 40)
    if type(found) is not int or found < 1:
        raise UserError(f"model.path: {path}: num_layers is no whole number from 1 on")
    return found


def pipeline_grid(path: str, frames: int, height: int, width: int) -> Grid:
    """The video token grid (T, H, W) of a clip, of a pipeline of which no weights are needed.

    Args:
        path: of the pipeline; of one on the hub, settings alone are fetched. A folder that holds
            no autoencoder or transformer, but a text encoder, stands for Wan 2.1.
        frames, height, width: of the clip.

    Raises:
        UserError: the clip does not fit the strides of the autoencoder and the patches.
    """
    needed = ("vae/config.json", "transformer/config.json")
    folder = local_folder(path, setting="model.path", marker=INDEX, patterns=[INDEX, *needed])
    if not all((folder / name).is_file() for name in needed):
        return 1 + (frames - 1) // LATENT_STRIDE, height // SIZE_STEP, width // SIZE_STEP
    frozen = frozen_parts(folder, precision="fp32", device="cpu")
    return frozen.token_grid(patch_size(folder / "transformer"), frames, height, width)


def pipeline_folder(path: str, parts: Sequence[str] = COMPONENTS) -> Path:
    """The folder of a pipeline, whose `parts` and tokenizer are fetched if it is on the hub only.

    Raises:
        UserError: the folder or the hub id cannot be used.
    """
    patterns = [INDEX, "tokenizer/*"]
    # no other kind of file of a part, so that no pickle is loaded
    patterns += [f"{part}/*.{ending}" for part in parts for ending in PART_FILES]
    return local_folder(path, setting="model.path", marker=INDEX, patterns=patterns)


def load_text_encoder(
    path: str,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | str = "cpu",
    load: bool = True,
) -> TextEncoder:
    """The text encoder of a diffusers Wan pipeline and nothing else of it.

    Args:
        path: pipeline folder, shipped asset or hub id.
        precision: of its weights.
        device: where it goes.
        load: now; else when it is first used.

    Raises:
        UserError: the folder or the hub id cannot be used.
    """
    folder = pipeline_folder(path, TEXT_PARTS[:1])
    for part in TEXT_PARTS:
        if not (folder / part).is_dir():
            raise UserError(f"model.path: {folder} has no {part}/ folder")
    encoder = frozen_parts(folder, precision=precision, device=device).text
    if load:
        encoder.load()
    return encoder


def checked_pipeline(path: str, expert: Expert | None = None) -> Path:
    """`pipeline_folder` of what a run loads: one transformer, the frozen parts, a scheduler.

    Of a pipeline on the hub its model_index.json is looked at before anything else is fetched.

    Args:
        path: of the pipeline.
        expert: that is loaded, of two.

    Raises:
        UserError: as `check_index`, or a file of it is missing or damaged.
    """
    check_index(path, expert)
    parts = (transformer_part(expert), *FROZEN)
    folder = pipeline_folder(path, parts)
    absent = [part for part in parts if not (folder / part).is_dir()]
    if absent:
        raise UserError(f"model.path: {folder} has no {absent[0]}/ folder")
    for part in parts:  # also the scheduler, which an export copies
        check_model_files(folder / part, setting="model.path")
    read_object(folder / "scheduler" / "scheduler_config.json", setting="model.path")
    return folder


def _check_text_to_video(
    transformer: WanTransformer3DModel, frozen: FrozenParts, path: str
) -> None:
    inputs, latents = transformer.config["in_channels"], frozen.vae_config["z_dim"]
    if inputs != latents:
        raise UserError(
            f"model.path: {path} is no text-to-video model: its transformer takes {inputs} "
            f"channels, its autoencoder gives {latents}"
        )
