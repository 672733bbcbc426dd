"""The expert of a Wan 2.2 A14B pipeline that a run does not train: on the device for its steps.

While it denoises, the trained one waits in main memory: a device that trains one has no room for
two. Of a trained one in shards each device has a part, which stays.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from diffusers import WanTransformer3DModel

from alignlab.config.model import ModelConfig
from alignlab.distributed.sharding import has_shards
from alignlab.errors import UserError
from alignlab.models.experts import noise_window, other_part
from alignlab.models.late_model import CPU, LateModel
from alignlab.models.model_files import check_model_files
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.wan import Wan, pipeline_folder, read_transformer


class OtherExpert:
    """Denoises clips beside the expert that is trained, with the same references and settings.

    A context manager: it is loaded at the first noise level that is its own, from the pipeline that
    the run started from, and leaves memory at the exit. What a step of sampling asks is
    `branch_at`; the trained expert is on the device before the first, and after the exit.

    Args:
        wan: the model with the trained expert.
        model: the recipe's settings of it, with an expert.
        keeps: for several clips: it waits in main memory where the trained expert takes over. Else
            it is freed there.
    """

    def __init__(self, wan: Wan, model: ModelConfig, *, keeps: bool) -> None:
        assert model.expert is not None
        self._wan, self._model, self._keeps = wan, model, keeps
        self._window = noise_window(model)
        self._part = other_part(model.expert)
        self._late = LateModel(self._load, CPU)
        self._branch: ReferenceBranch | None = None
        self._is_at_work = False

    @property
    def num_loads(self) -> int:
        """How often it was loaded."""
        return self._late.num_loads

    @property
    def is_loaded(self) -> bool:
        """Whether it takes memory."""
        return self._late.is_loaded

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._trained_takes_over()
        if self._branch is not None:
            self._free()

    def is_low(self, sigma: float) -> bool:
        """Whether a noise level is the low-noise expert's."""
        return self._window.holds(sigma) == (self._model.expert == "low")

    def branch_at(self, sigma: float, trained: ReferenceBranch) -> ReferenceBranch:
        """Which of the two denoises at a noise level.

        Args:
            sigma: the level.
            trained: the trained expert.

        Raises:
            UserError: the other's files cannot be had.
        """
        if self._window.holds(sigma):
            self._trained_takes_over()
            return trained
        if not self._is_at_work:
            self._takes_over()
        assert self._branch is not None
        return self._branch

    def _takes_over(self) -> None:
        trained, device = self._wan.transformer, self._wan.device
        self._is_at_work = True
        if not has_shards(tuple(trained.parameters())):
            move(trained, CPU)
        if self._branch is None:
            self._branch = ReferenceBranch.of(self._late.loaded(), self._model)
            self._branch.__enter__()
        move(self._late.loaded(), device)

    def _trained_takes_over(self) -> None:
        if not self._is_at_work:
            return
        self._is_at_work = False
        if not self._keeps:
            self._free()
        elif self._branch is not None:
            move(self._late.loaded(), CPU)
        if not has_shards(tuple(self._wan.transformer.parameters())):
            move(self._wan.transformer, self._wan.device)

    def _free(self) -> None:
        if self._branch is not None:
            self._branch.__exit__(None, None, None)
        self._branch = None
        self._late.free()

    def _load(self) -> WanTransformer3DModel:
        folder = folder_with_other(self._model)
        dtype = torch.bfloat16 if self._model.precision == "bf16" else torch.float32
        transformer = read_transformer(folder, self._part, dtype)
        transformer.set_attention_backend(self._model.attention)
        # not compiled: it would be anew for each evaluation, in minutes, for a few clips
        return transformer.requires_grad_(False).eval()


def move(transformer: WanTransformer3DModel, device: torch.device) -> None:
    """Moves weights and buffers; those that an optimizer knows stay the same parameters."""
    transformer.to(device)


def folder_with_other(model: ModelConfig) -> Path:
    """The pipeline's folder, with the other expert's files; on the hub they are fetched.

    Args:
        model: the recipe's settings of it, with an expert.

    Raises:
        UserError: they cannot be had, or are damaged.
    """
    assert model.expert is not None
    part = other_part(model.expert)
    folder = pipeline_folder(model.path, (part,))
    if not (folder / part).is_dir():
        raise UserError(
            f"model.path: {folder} has no {part}/ folder, which is needed beside "
            f"model.expert={model.expert} to generate clips and to export: fetch it, or set "
            "eval.sample_clips=0 and eval.generated_clips=0"
        )
    check_model_files(folder / part, setting="model.path")
    return folder


def other_expert(
    wan: Wan, model: ModelConfig, *, keeps: bool
) -> AbstractContextManager[OtherExpert | None]:
    """That of a run, or None where its pipeline has one transformer; see `OtherExpert`."""
    return nullcontext() if model.expert is None else OtherExpert(wan, model, keeps=keeps)
