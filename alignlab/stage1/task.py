"""What the training loop of Stage 1 asks of a task: a network and what it is trained to do."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from alignlab.config.data import Settings
from alignlab.data.sample import ClipDataset
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.losses.objective import Features
from alignlab.teachers import Teacher
from alignlab.training.encoded import ClipPixels, FeatureRead, kept_features

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
        values: what the models made of clips and texts, on disk.
    """

    teacher: Teacher
    grid: tuple[int, int]
    text: "TextEncoder | None"
    device: torch.device
    values: EncodedValues

    @property
    def read(self) -> FeatureRead:
        """What is read of the teacher."""
        return FeatureRead(self.teacher, "video", self.grid)

    def features(self, pixels: ClipPixels) -> Features:
        """The teacher's tokens of a clip, a batch of one, on the CPU."""
        tokens_TPD = kept_features(self.values, self.read, pixels).cpu()
        return Features(tokens_TPD[None], (len(tokens_TPD), *self.grid))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, (B, L, D) on the CPU."""
        from alignlab.training.kept_text import kept_text  # here: see `text`

        assert self.text is not None  # of a task that reads text
        return torch.stack([kept_text(self.values, self.text, text) for text in texts])


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

    @classmethod
    def texts(
        cls, settings: Stage1Settings, dataset: ClipDataset, index: int, *, measured: bool
    ) -> tuple[str, ...]:
        """Texts of a clip whose embeddings the task reads; nothing is decoded.

        Args:
            settings: of the recipe's `stage1`.
            dataset: that has the clip.
            index: of the clip.
            measured: in an evaluation.
        """
        return ()

    @abstractmethod
    def encode(self, pixels: ClipPixels) -> Clip:
        """Runs the frozen models on one clip, through `FrozenModels`.

        Raises:
            UserError: the data set lacks what the network learns from.
        """

    @abstractmethod
    def loss(self, clips: Sequence[Clip]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its terms by their names in the log."""

    @abstractmethod
    def evaluate(self, clips: Iterable[Clip]) -> dict[str, float]:
        """Metrics on held-out clips, named `val/...`."""
