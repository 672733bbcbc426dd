"""Loads a teacher from a transformers folder, a shipped asset or a hub id."""

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignlab.config.data import unknown_name
from alignlab.errors import UserError
from alignlab.models.model_files import (
    check_model_files,
    load_pretrained,
    local_folder,
    read_object,
)
from alignlab.models.weight_check import check_weights
from alignlab.progress import warn_once
from alignlab.teachers import videomae_v2
from alignlab.teachers.diffusion import DiffusionTeacher, diffusion_folder
from alignlab.teachers.files import check_no_checkpoint, is_checkpoint, setting_of
from alignlab.teachers.original import original_file, original_model
from alignlab.teachers.preprocessing import Preprocessing, read_preprocessing, row_preprocessing
from alignlab.teachers.registry import TeacherRow, teacher_rows
from alignlab.teachers.teacher import TEACHER_FILES, LaterModel, Teacher
from alignlab.teachers.wheels import WHEELS

if TYPE_CHECKING:
    from alignlab.config.data import ClipsConfig

    # it reads the table of families, so that the import is one way
    from alignlab.config.parts import TeacherConfig
    from alignlab.models.frozen_parts import FrozenParts


def teacher_from(
    config: "TeacherConfig",
    *,
    device: torch.device | str,
    load: bool = True,
    is_parked: bool = True,
) -> Teacher:
    """The encoder that a recipe's `teachers.<alias>` says; see `load_teacher`."""
    return load_teacher(
        config.family,
        path=config.path,
        feature=config.feature,
        config=config.config,
        grid=config.grid,
        device=device,
        load=load,
        is_parked=is_parked,
    )


def teacher_of_clips(
    config: "TeacherConfig",
    clip: "ClipsConfig",
    encoders: "FrozenParts | None",
    *,
    alias: str,
    device: torch.device,
    load: bool,
    is_parked: bool = True,
) -> Teacher | DiffusionTeacher:
    """The teacher that a recipe's `teachers.<alias>` says, of either kind.

    Args:
        config: the teacher's.
        clip: frames and size of the clips that it sees.
        encoders: the student's, whose latents and texts a diffusion teacher reads.
        alias: the recipe's name of it, for messages.
        device: where it runs.
        load: see `load_teacher`.
        is_parked: likewise.

    Raises:
        UserError: it cannot be used, or not with these clips and encoders.
    """
    if teacher_rows()[config.family].reads == "frames":
        return teacher_from(config, device=device, load=load, is_parked=is_parked)
    assert encoders is not None  # of every run
    return DiffusionTeacher(
        config,
        alias=alias,
        encoders=encoders,
        clip=clip,
        device=device,
        load=load,
        is_parked=is_parked,
    )


def load_teacher(
    family: str,
    *,
    path: str | None = None,
    feature: str | None = None,
    config: str | None = None,
    grid: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    slice_size: int = 16,
    load: bool = True,
    is_parked: bool = True,
) -> Teacher:
    """Loads a teacher: bf16 on a GPU, fp32 on a CPU.

    Pixels are normalised as the folder's processor config says, or else as the family's row does.

    Args:
        family: row of `TEACHERS`.
        path: transformers folder, shipped asset, hub id, or the file of an original checkpoint
            (`original.py`); None takes the row's. Of a larger model (SAM 2) only the part that is
            run is loaded.
        feature: see `Teacher`; None takes the row's.
        config: of an original SAM 2 checkpoint, the package's config; None: by the file's name.
        grid: see `Teacher`.
        device: where it runs.
        slice_size: frames per forward pass.
        load: the model now, to stay on the device; else when its features are first needed.
        is_parked: one that is loaded later is on the device only while it makes features.

    Raises:
        UserError: no such family, folder or feature, a model of another family, a broken
            processor config, or weights that are not finite or all zero.
    """
    rows = teacher_rows()
    if family not in rows:
        raise UserError(f"teachers: {unknown_name('family', family, rows)}")
    row = rows[family]
    if row.reads == "latents":
        raise UserError(f"teachers: {family} reads latents of a run, and no frames by themselves")
    folder = teacher_folder(family, path or row.path)
    where, is_parked = torch.device(device), is_parked and not load
    later, preprocessing = _model_of(folder, family, config, where, is_parked=is_parked)
    try:
        teacher = Teacher(
            later,
            family,
            feature or row.feature,
            grid=grid,
            slice_size=slice_size,
            preprocessing=preprocessing,
            folder=folder,
        )
        if load:
            teacher.load()
    except (TypeError, AttributeError) as error:  # settings that are no numbers, or not there
        raise UserError(f"teachers: cannot use {folder / 'config.json'}: {error}") from error
    return teacher


def _model_of(
    source: Path, family: str, config: str | None, device: torch.device, *, is_parked: bool
) -> tuple[LaterModel, Preprocessing]:
    """The model of a folder, or of the file of a checkpoint, and how it gets its pixels."""
    row = teacher_rows()[family]
    if source.is_file():
        later = original_model(
            source, family, config_name=config, device=device, is_parked=is_parked
        )
        return later, row_preprocessing(row)
    _refuse_config(family, config, source)
    preprocessing, warning = read_preprocessing(source, row)
    if warning is not None:
        warn_once(f"teachers ({family}): {warning}")
    model_type = _model_type(source, family)
    return _later_model(source, family, model_type, device, is_parked=is_parked), preprocessing


def _refuse_config(family: str, config: str | None, folder: Path) -> None:
    if config is not None:
        raise UserError(
            f"teachers ({family}) config: {config}: nothing reads it, {folder} is a folder of "
            "transformers, which has its own settings: remove it"
        )


def _model_type(folder: Path, family: str) -> str:
    found, row = str(_read_config(folder).get("model_type")), teacher_rows()[family]
    if found in row.refused:
        raise UserError(f"teachers: {folder} holds a {found} model, {row.refused[found]}")
    if found not in row.classes:
        raise UserError(
            f"teachers: {folder} holds a {found} model, family {family} loads "
            f"{', '.join(row.classes)}"
        )
    return found


def _later_model(
    folder: Path, family: str, model_type: str, device: torch.device, *, is_parked: bool
) -> LaterModel:
    config = _model_config(folder, teacher_rows()[family], model_type)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    read = partial(_loaded, folder, family, config, dtype)
    return LaterModel(config, dtype, device, read, is_parked=is_parked)


def _loaded(folder: Path, family: str, config: Any, dtype: torch.dtype) -> Any:
    """The model, of weights that were looked at."""
    row = teacher_rows()[family]
    model = _load(folder, row, config, dtype).requires_grad_(False).eval()
    if row.layout == "packed":
        from alignlab.teachers.qwen2_5_vl import QwenVisionTower

        model = QwenVisionTower(model).eval()
    named = model.named_parameters()
    read = ((name, weight) for name, weight in named if not re.search(row.unread, name))
    check_weights(f"teachers ({family}): {folder}", read)
    return model


def teacher_folder(family: str, path: str) -> Path:
    """The folder of a teacher, which is fetched if it is on the hub only, or its checkpoint's file.

    Raises:
        UserError: the folder, the file or the hub id cannot be used.
    """
    if teacher_rows()[family].reads == "latents":
        return diffusion_folder(family, path)
    if is_checkpoint(path):
        return original_file(family, path)
    check_no_checkpoint(path, family)
    if not teacher_rows()[family].classes:
        raise UserError(
            f"{setting_of(family)}: {path} is none of the files that it is read from: "
            f"{WHEELS[family].fix}"
        )
    return local_folder(
        path,
        setting=setting_of(family),
        marker="config.json",
        patterns=[f"*.{ending}" for ending in TEACHER_FILES],
    )


def model_config_of(folder: Path, family: str) -> Any:
    """The settings of the model that a family runs, of a folder whose weights are not read.

    Raises:
        UserError: the folder holds another model, or its settings are damaged.
    """
    return _model_config(folder, teacher_rows()[family], _model_type(folder, family))


def model_class_of(folder: Path, family: str) -> Any:
    """The class of transformers that runs the model of a folder.

    Raises:
        UserError: the folder holds another model, or transformers has no such class.
    """
    return _model_class(teacher_rows()[family], _model_type(folder, family))


def _model_class(row: TeacherRow, model_type: str) -> Any:
    import transformers

    model_class = getattr(transformers, row.classes[model_type], None)
    if model_class is None:
        raise UserError(
            f"teachers: transformers {transformers.__version__} has no {row.classes[model_type]}, "
            f"which runs a {model_type} model"
        )
    return model_class


def _model_config(folder: Path, row: TeacherRow, model_type: str) -> Any:
    """The settings of the model that the row runs."""
    import transformers

    model_class = _model_class(row, model_type)
    check_model_files(folder, setting="teachers")
    if model_type in videomae_v2.MODEL_TYPES:
        config = model_class.config_class(**videomae_v2.config_values(_read_config(folder)))
    else:
        config = load_pretrained(transformers.AutoConfig, folder, setting="teachers")
    for name in row.part:
        config = getattr(config, name, config)
    return config


def _load(folder: Path, row: TeacherRow, config: Any, dtype: torch.dtype) -> Any:
    """The model that the row runs; weights of the folder that it does not have are left alone."""
    model_type = str(_read_config(folder).get("model_type"))
    model_class = _model_class(row, model_type)
    source: dict[str, Any] = {"use_safetensors": True}
    if model_type in videomae_v2.MODEL_TYPES:
        source = {"state_dict": videomae_v2.weights(folder)}
    model, info = load_pretrained(
        model_class,
        folder,
        setting="teachers",
        **source,
        config=config,
        key_mapping={row.part_prefix: ""} if row.part_prefix else None,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # checked below
        output_loading_info=True,
    )
    _check_weights(folder, row, model, info)
    return model


def _check_weights(folder: Path, row: TeacherRow, model: Any, info: dict[str, Any]) -> None:
    """Refuses a folder whose weights are not those of the model that is run."""
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    missing = sorted(key for key in lacking if not re.search(row.unread, key))
    if missing:
        raise UserError(f"teachers: {folder} lacks {len(missing)} weights, e.g. {missing[0]}")
    # More weights in a module than it has: another architecture under the same name.
    modules = {name for name, _ in model.named_children() if not re.search(row.unread, f"{name}.")}
    foreign = sorted(key for key in info["unexpected_keys"] if key.split(".", 1)[0] in modules)
    if foreign:
        raise UserError(
            f"teachers: {folder} has {len(foreign)} weights that {type(model).__name__} does not "
            f"know, e.g. {foreign[0]}"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    return read_object(folder / "config.json", setting="teachers")
