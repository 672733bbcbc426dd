"""Teachers: frozen vision foundation models that turn frames or clips into patch features.

Shape letters: B batch, T frames, P patches per frame, D width, H height, W width, C channels,
N images or clips of one forward pass, L tokens of one.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignlab.dataset_cache.key import Part, digest_of
from alignlab.dataset_cache.model_parts import model_parts
from alignlab.errors import UserError
from alignlab.losses.objective import Features, Grid
from alignlab.models.late_model import LateModel
from alignlab.progress import tell_once
from alignlab.runs.digest import weights_digest
from alignlab.teachers.attention import recorded_attention
from alignlab.teachers.feature import find_feature
from alignlab.teachers.files import TEACHER_FILES as TEACHER_FILES
from alignlab.teachers.files import check_source_unchanged, source_digest
from alignlab.teachers.positions import Fit, position_fitter
from alignlab.teachers.preprocessing import Preprocessing, row_preprocessing
from alignlab.teachers.registry import Positions, TeacherRow, teacher_rows

_STATISTICS = ("running_mean", "running_var")
"""Ends of the names of what batch norm keeps besides its parameters."""


@dataclass(frozen=True)
class LaterModel:
    """A model that is loaded when it is first needed.

    Args:
        config: its settings, of transformers.
        dtype: of its weights.
        device: where it runs.
        load: loads it.
        is_parked: it is on the device only while it makes features.
        packages: whose code runs besides torch's.
        code: names code that is not the family's class of transformers; it fits positions itself.
    """

    config: Any
    dtype: torch.dtype
    device: torch.device
    load: Callable[[], Any]
    is_parked: bool = False
    packages: tuple[str, ...] = ("transformers",)
    code: str | None = None

    @classmethod
    def of(cls, model: Any) -> Self:
        """One that is loaded."""
        return cls(model.config, model.dtype, model.device, lambda: model)

    def positions(self, row: TeacherRow) -> Positions:
        """Who fits its positions to the grid."""
        return row.positions if self.code is None else "model"


class Teacher:
    """A frozen model with its preprocessing.

    Args:
        model: of a transformers class of the family, or what loads it when it is first needed.
        family: row of `TEACHERS`.
        feature: `pre_norm` (last block's output), `post_norm` (after the final norm), `layer:k`
            (output of block k, counted from 0), `stage:k` (of a Hiera backbone or a convolutional
            network, from 1), or `attention:k` or `attention:k-m` (queries and keys of blocks).
        grid: of patches (H, W) that the harness asks for on video frames; None: the student's.
        slice_size: frames per forward pass; bounds memory, changes results by rounding at most. A
            video family takes at least one whole clip.
        preprocessing: how its pixels are normalised; None: as the family's row says.
        folder: that the model was loaded from, or the file of a checkpoint; None: it was not.

    Attributes:
        heads: of each block whose queries and keys the features are (`Features.heads`).

    Raises:
        UserError: there is no such feature.
    """

    def __init__(
        self,
        model: "nn.Module | LaterModel",
        family: str,
        feature: str,
        *,
        grid: tuple[int, int] | None = None,
        slice_size: int = 16,
        preprocessing: Preprocessing | None = None,
        folder: Path | None = None,
    ) -> None:
        later = LaterModel.of(model) if isinstance(model, nn.Module) else model
        self._later, self._config = later, later.config
        self._late_model = LateModel(self._load, later.device, is_parked=later.is_parked)
        self._folder = folder
        self._family = family
        self._row = teacher_rows()[family]
        self._preprocessing = preprocessing or row_preprocessing(self._row)
        self._has_told_sizes = False
        self._slice_size = slice_size
        self.grid = grid
        self._feature = find_feature(self._config, family, feature)
        self._fitted: Grid | None = None
        self._num_prefix = self._row.class_tokens + int(
            getattr(self._config, "num_register_tokens", 0)
        )
        self._takes_images = bool(getattr(self._config, "takes_images", False))
        self.tubelet = int(self._config.tubelet_size) if self._row.video else 1
        self.dim = self._feature.dim
        self.heads = self._feature.heads
        self.patch_size = self._feature.stride

    @property
    def _model(self) -> Any:
        return self._late_model.loaded()

    def _load(self) -> Any:
        model = self._later.load()
        if self._folder is not None and "parts" in vars(self):
            check_source_unchanged(self._folder, self.parts["weights"])
        return model

    @cached_property
    def _fit_positions(self) -> Fit:
        return position_fitter(self._model, self._later.positions(self._row))

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pixels, once on the device."""
        mean, std = self._preprocessing.mean, self._preprocessing.std
        device = self._model.device
        return (
            torch.tensor(mean, device=device).view(3, 1, 1),
            torch.tensor(std, device=device).view(3, 1, 1),
        )

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"teachers ({self._family})"

    @property
    def feature(self) -> str:
        """Name of its feature, as in a recipe."""
        return self._feature.name

    @property
    def is_video(self) -> bool:
        """Whether it sees whole clips, and leaves their first frame out."""
        return self._row.video

    def load(self) -> None:
        """Loads the model, if it is not loaded yet.

        Raises:
            UserError: its files cannot be used, or have changed since `parts` named them.
        """
        self._late_model.loaded()

    def weights_bytes(self) -> int:
        """Size of the loaded weights."""
        weights = self._model.parameters()
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def digest(self) -> str:
        """Names the weights that the features depend on, whatever folder they came from.

        Rounded to bf16: on a CPU they are kept in fp32, on a GPU in bf16. A normalisation of pixels
        that is not the family's is named with them.
        """
        # batch norm scales by running statistics as it does by weights
        statistics = ((n, b) for n, b in self._model.named_buffers() if n.endswith(_STATISTICS))
        named = chain(self._model.named_parameters(), statistics)
        read = {name: p for name, p in named if not re.search(self._row.unread, name)}
        weights = weights_digest(read, torch.bfloat16)
        normalisation = self._preprocessing.normalisation
        if normalisation == row_preprocessing(self._row).normalisation:
            return weights
        return hashlib.sha256(f"{weights} {normalisation}".encode()).hexdigest()

    @cached_property
    def parts(self) -> dict[str, Part]:
        """What its features depend on besides the pixels and the grid, for keys of the dataset
        cache: the files of its folder, or without one its weights."""
        if self._folder is None:
            weights = self.digest()
        else:
            weights = source_digest(self._folder)
        code: dict[str, Part] = {} if self._later.code is None else {"code": self._later.code}
        row, (mean, std, scale) = self._row, self._preprocessing.normalisation
        return {
            "family": self._family,
            "weights": weights,
            "feature": self.feature,
            "slice": self._slice_size,
            "mean": mean,
            "std": std,
            "scale": scale,
            "resize": row.resize,
            "positions": self._later.positions(row),
            "class_tokens": row.class_tokens,
            "options": tuple(sorted(row.options.items())),
            **code,
            **model_parts(self._later.dtype, self._later.device, *self._later.packages),
        }

    @cached_property
    def identity(self) -> str:
        """Short for `parts`."""
        return digest_of("teacher", self.parts)

    @torch.no_grad()
    def encode(self, frames_BTHWC: Tensor, grid_HW: tuple[int, int]) -> Features:
        """Patch features of uint8 frames, fp32, on a grid of the requested size.

        Frames are resized to `grid * patch_size` pixels, so that the features need no
        interpolation: 480x832 frames for a 30x52 grid and patch 16 stay as they are (RefAlign),
        256x256 frames for 16x16 and patch 14 become 224x224 (REPA).

        An image family gives T frames of features. A video family drops the first frame, which a
        causal video VAE encodes by itself (VideoREPA's code), and gives one per tubelet: 2k for
        1 + 4k frames and tubelets of 2. One that embeds images as well (V-JEPA 2.1) takes a clip of
        one frame as an image.

        Raises:
            UserError: the grid or the number of frames does not suit the model.
        """
        if frames_BTHWC.dtype != torch.uint8 or frames_BTHWC.ndim != 5:
            raise ValueError(
                f"expected uint8 (B, T, H, W, C) frames, got {frames_BTHWC.dtype} "
                f"{tuple(frames_BTHWC.shape)}"
            )
        batch, frames = frames_BTHWC.shape[:2]
        size = self._frame_size(grid_HW)
        if self.is_video and frames == 1 and self._takes_images:
            passes = frames_BTHWC.split(self._slice_size)
        elif self.is_video:
            frames = self._tubelets(frames)
            passes = frames_BTHWC[:, 1:].split(max(1, self._slice_size // (frames * self.tubelet)))
        else:
            passes = frames_BTHWC.flatten(0, 1)[:, None].split(self._slice_size)
        grid = (frames, *grid_HW)
        with self._late_model.in_use() as model:
            if self._fitted != grid:
                self._fit_positions(grid)
                self._fitted = grid
            tokens_NLD = torch.cat([self._forward(model, clips, size) for clips in passes])
        return Features(tokens_NLD.reshape(batch, frames, -1, self.dim), grid, self.heads)

    def _forward(self, model: Any, clips_NTHWC: Tensor, size: tuple[int, int]) -> Tensor:
        device = model.device
        pixels = clips_NTHWC.to(device).flatten(0, 1).permute(0, 3, 1, 2).float() / 255.0
        is_resized = pixels.shape[2:] != size
        if is_resized:
            pixels = F.interpolate(pixels, size, mode=self._row.resize, antialias=True)
            pixels = pixels.clamp(0.0, 1.0)
        self._tell_sizes(size, self._row.resize if is_resized else None)
        if self._preprocessing.scale != 1:
            pixels = pixels * self._preprocessing.scale
        mean_C11, std_C11 = self._statistics
        pixels = ((pixels - mean_C11) / std_C11).to(model.dtype)
        if self.is_video:
            pixels = pixels.unflatten(0, clips_NTHWC.shape[:2])
        feature = self._feature
        with torch.autocast(device.type, enabled=False):
            with recorded_attention(model, feature.layers) as attention:
                out = model(
                    **{self._row.input_name: pixels},
                    output_hidden_states=feature.hidden_states,
                    **self._row.options,
                )
            tokens_NLD = feature.read(attention if feature.layers else out)
        return tokens_NLD[:, self._num_prefix :].float()

    def _tell_sizes(self, size_HW: tuple[int, int], resize: str | None) -> None:
        """Logs once where the frames differ from those that the model's folder asks for."""
        difference = None
        if not self._has_told_sizes:
            difference = self._preprocessing.difference(size_HW, resize)
        if difference is not None:
            tell_once(f"{self.name}: {difference}")
            self._has_told_sizes = True

    def _frame_size(self, grid_HW: tuple[int, int]) -> tuple[int, int]:
        """Pixels of a frame that give the requested grid."""
        stride, multiple = self._feature.stride, self._feature.multiple
        height, width = (count * stride for count in grid_HW)
        if height % multiple or width % multiple:
            raise UserError(
                f"{self.name}: {self._feature.name} needs a token grid whose sides "
                f"are multiples of {multiple // stride}, not {grid_HW[0]}x{grid_HW[1]}: set "
                "teachers.<alias>.grid or change data.size"
            )
        return height, width

    def _tubelets(self, frames: int) -> int:
        """Counts the tubelets after a clip's first frame."""
        if frames <= 1 or (frames - 1) % self.tubelet:
            needed = f"1 + {self.tubelet}n" if self.tubelet > 1 else "at least 2"
            raise UserError(
                f"{self.name}: a video teacher needs clips of {needed} "
                f"frames, not {frames}: change data.frames, or take an image teacher"
            )
        return (frames - 1) // self.tubelet
