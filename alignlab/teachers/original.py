"""Teachers from their authors' checkpoints: files of `torch.save`, read as tensors and never run.

A family that has such checkpoints has a row in `ORIGINALS`: which settings a file's model has, and
how it is made of its weights. Some lie in wheels (`wheels.py`).
"""

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from alignlab.errors import UserError, one_line
from alignlab.models.model_files import check_may_load
from alignlab.models.weight_check import check_weights
from alignlab.teachers import mobilenet_v2, sam2_package, transnet_v2, vjepa2_1
from alignlab.teachers.files import checkpoint_file, setting_of
from alignlab.teachers.teacher import LaterModel
from alignlab.teachers.wheels import ENDING, WHEELS, read_weights

_LOAD_ERRORS = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError)
"""What `torch.load` raises on a file that is damaged, or holds more than tensors."""


@dataclass(frozen=True)
class _Original:
    """How the checkpoints of a family are read.

    Args:
        settings: of the model, of the file and the recipe's `config`; a UserError says what is
            wrong with either.
        weights: of the part that is run, of what the file holds; a ValueError says what it lacks.
        build: the model of its settings, on the device meta.
        packages: whose code runs besides torch's.
        code: names it in the keys of the dataset cache; to change with what it computes.
    """

    settings: Callable[[Path, str | None], Any]
    weights: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    build: Callable[[Any], nn.Module]
    packages: tuple[str, ...]
    code: str


def _vjepa2_settings(file: Path, config_name: str | None) -> Any:
    try:
        return vjepa2_1.read_config(_weights(file, "vjepa2"))
    except ValueError as error:
        raise UserError(f"teachers (vjepa2): {file} {error}") from None


WHEEL_SETTINGS: Mapping[str, Callable[[], Any]] = {
    "mobilenet_v2": mobilenet_v2.torchvision_config,
    "transnet_v2": transnet_v2.TransNetConfig,
}
"""Of the models in wheels, whose settings no file says."""


def _wheel_settings(family: str) -> Callable[[Path, str | None], Any]:
    """The same of every file, which is looked at now: it has to be the one that is known."""

    def of_file(file: Path, config_name: str | None) -> Any:
        read_weights(file, family)
        return WHEEL_SETTINGS[family]()

    return of_file


ORIGINALS = {
    "sam2": _Original(
        sam2_package.read_config,
        sam2_package.trunk_weights,
        sam2_package.HieraTrunk,
        ("sam2",),
        "sam2's Hiera, v1",
    ),
    "vjepa2": _Original(
        _vjepa2_settings, vjepa2_1.encoder_weights, vjepa2_1.empty_model, (), "V-JEPA 2.1, v1"
    ),
    "mobilenet_v2": _Original(
        _wheel_settings("mobilenet_v2"),
        mobilenet_v2.renamed,
        mobilenet_v2.empty_model,
        ("transformers",),
        "MobileNetV2 as torchvision's, v1",
    ),
    "transnet_v2": _Original(
        _wheel_settings("transnet_v2"),
        transnet_v2.stage_weights,
        transnet_v2.empty_model,
        (),
        "TransNetV2, v1",
    ),
}


def wheel_model(family: str) -> nn.Module:
    """The model whose weights a wheel holds, without weights: memory for them is not initialised.

    Args:
        family: key of `WHEELS`.
    """
    model: nn.Module = ORIGINALS[family].build(WHEEL_SETTINGS[family]())
    return model.to_empty(device="cpu")


def original_file(family: str, path: str) -> Path:
    """The file of a checkpoint.

    Raises:
        UserError: there is none, or the family has no such checkpoints.
    """
    if family not in ORIGINALS:
        raise UserError(
            f"teachers ({family}) path: {path} is a checkpoint, which families "
            f"{', '.join(ORIGINALS)} read: name a transformers folder or a hub id"
        )
    if path.endswith(ENDING) and family not in WHEELS:
        raise UserError(
            f"{setting_of(family)}: {path} is a wheel, which families {', '.join(WHEELS)} read: "
            "name the checkpoint's file"
        )
    return checkpoint_file(path, family)


def original_model(
    file: Path,
    family: str,
    *,
    config_name: str | None,
    device: torch.device,
    is_parked: bool,
) -> LaterModel:
    """The model of a checkpoint; only its shape is read now.

    Args:
        file: of the checkpoint.
        family: key of `ORIGINALS`.
        config_name: of the package sam2's configs; None: by the file's name.
        device: where it runs; bf16 on a GPU, fp32 on a CPU.
        is_parked: see `LaterModel`.

    Raises:
        UserError: the file cannot be used, or nothing reads the name of a config.
    """
    original = ORIGINALS[family]
    if config_name is not None and family != "sam2":
        raise UserError(
            f"teachers ({family}) config: {config_name}: nothing reads it, the settings of {file} "
            "are known without: remove it"
        )
    config = original.settings(file, config_name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    load = partial(_loaded, file, family, config, dtype)
    return LaterModel(
        config,
        dtype,
        device,
        load,
        is_parked=is_parked,
        packages=original.packages,
        # of a wheel all is known that the settings could say
        code=original.code if family in WHEELS else f"{original.code} {config}",
    )


def _loaded(file: Path, family: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model, of weights that were looked at."""
    where = f"teachers ({family}): {file}"
    check_may_load(file)
    weights = _weights(file, family)
    model = ORIGINALS[family].build(config)
    _check_names(where, model, weights)
    # copies: those of the file are mapped to it, and go with it
    own = {
        name: value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
        for name, value in weights.items()
    }
    check_weights(where, own.items())
    model.load_state_dict(own, assign=True)
    return model.requires_grad_(False).eval()


def _weights(file: Path, family: str) -> dict[str, Tensor]:
    where = f"teachers ({family}): {file}"
    try:
        # mapped, so that the optimizer's state beside the weights is not read
        source: Path | IO[bytes] = file
        if family in WHEELS:
            source = io.BytesIO(read_weights(file, family))
        checkpoint = torch.load(
            source,
            map_location="cpu",
            weights_only=True,
            mmap=family not in WHEELS and zipfile.is_zipfile(file),
        )
    except _LOAD_ERRORS as error:
        reason = one_line(error).split(". ")[0] or type(error).__name__
        raise UserError(
            f"{where} cannot be read as tensors ({reason}): fetch it again; a file that holds "
            "more than tensors is never run"
        ) from None
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{where} holds a {type(checkpoint).__name__}, no checkpoint")
    try:
        return ORIGINALS[family].weights(checkpoint)
    except ValueError as error:
        raise UserError(f"{where} {error}") from None


def _check_names(where: str, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not those of the model that is run."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    lacking = sorted(
        name for name in shapes if name not in weights or weights[name].shape != shapes[name]
    )
    if lacking:
        raise UserError(f"{where} lacks {len(lacking)} weights of its model, e.g. {lacking[0]}")
    foreign = sorted(set(weights) - set(shapes))
    if foreign:
        raise UserError(
            f"{where} has {len(foreign)} weights that its model does not know, e.g. {foreign[0]}"
        )
