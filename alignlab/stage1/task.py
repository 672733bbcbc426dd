"""What the training loop of Stage 1 asks of a task: a network and what it is trained to do."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from alignlab.config.data import Settings
from alignlab.data.sample import ClipDataset, Sample
from alignlab.teachers import Teacher

if TYPE_CHECKING:  # diffusers takes seconds to import, and a recipe is read without it
    from alignlab.models.text_encoder import TextEncoder

Clip = TypeVar("Clip")


class Stage1Settings(Settings):
    """What every Stage 1 has; each task adds a literal `kind` and its own settings."""

    kind: str
    """Which task."""
    val_clips: int = Field(default=32, ge=1)
    """Val clips that are measured at the end, taken from the start of the split."""


@dataclass(frozen=True)
class FrozenModels:
    """What a task reads.

    Args:
        teacher: whose tokens the network reads.
        grid: (height, width) in tokens that the teacher is asked for.
        text: embeds phrases; None for a task that reads no text.
        device: where the network goes.
    """

    teacher: Teacher
    grid: tuple[int, int]
    text: "TextEncoder | None"
    device: torch.device


class Stage1Task(ABC, Generic[Clip]):
    """A network, what it is trained to do and how well it does it. Concrete classes are final.

    `Clip` is what the frozen models make of a sample, on the CPU.

    Args:
        settings: of the recipe's `stage1`, an instance of `Settings`.
        models: what the task reads.
        seed: of the run; the network's initial weights depend on it alone.
    """

    Settings: ClassVar[type[Stage1Settings]]
    reads_text: ClassVar[bool]
    """Whether the recipe names a model whose text encoder embeds phrases."""
    network: nn.Module
    shape: BaseModel
    """The config that the network was built from."""

    @abstractmethod
    def __init__(self, settings: Stage1Settings, models: FrozenModels, *, seed: int) -> None: ...

    @classmethod
    def check_data(cls, *datasets: ClipDataset) -> None:
        """Refuses data sets without what the network learns from, before models are loaded.

        Raises:
            UserError: a clip lacks it.
        """

    @abstractmethod
    def encode(self, sample: Sample) -> Clip:
        """Runs the frozen models on one clip.

        Raises:
            UserError: the data set lacks what the network learns from.
        """

    @abstractmethod
    def loss(self, clips: Sequence[Clip]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its terms by their names in the log."""

    @abstractmethod
    def evaluate(self, clips: Iterable[Clip]) -> dict[str, float]:
        """Metrics on held-out clips, named `val/...`."""
