"""What the training loop of Stage 1 asks of either kind of network."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from alignlab.data.sample import ClipDataset, Sample
from alignlab.losses.stage1.folder import Stage1Info, Stage1Teacher
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig
from alignlab.losses.stage1.saliency_aligner import SaliencyAligner, SaliencyAlignerConfig
from alignlab.stage1.config import Stage1Config
from alignlab.teachers import Teacher
from alignlab.training.batches import ClipCache

Clip = TypeVar("Clip")


class Stage1Task(ABC, Generic[Clip]):
    """A network, what it is trained to do and how well it does it. Concrete classes are final.

    `Clip` is what the frozen models make of a sample, on the CPU.
    """

    network: SaliencyAligner | MotionHead

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

    @abstractmethod
    def info(self) -> Stage1Info:
        """What a Stage 2 recipe is checked against."""


class TaskClips(Generic[Clip]):
    """A data set as its task sees it.

    Args:
        task: encodes one clip at a time, so that a clip never depends on its neighbours.
        dataset: where samples come from.
        capacity: encoded clips kept in memory.
    """

    def __init__(self, task: Stage1Task[Clip], dataset: ClipDataset, capacity: int) -> None:
        self._task = task
        self._dataset = dataset
        self._cache: ClipCache[Clip] = ClipCache(capacity)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Clip:
        clip = self._cache.get(index)
        if clip is None:
            clip = self._task.encode(self._dataset[index])
            self._cache.put(index, clip)
        return clip


def stage1_info(
    config: Stage1Config,
    module: SaliencyAlignerConfig | MotionHeadConfig,
    teacher: Teacher,
    *,
    text: str | None = None,
) -> Stage1Info:
    """What a Stage 1 training writes beside its weights.

    Args:
        config: of the training.
        module: shape of the network.
        teacher: whose tokens it read.
        text: the model whose text encoder it read.
    """
    row = config.teacher
    assert row.path is not None and row.feature is not None  # the family's, if left out
    return Stage1Info(
        kind=config.stage1.kind,
        teacher=Stage1Teacher(
            family=row.family, path=row.path, feature=row.feature, weights=teacher.digest()
        ),
        teacher_dim=module.teacher_dim,
        grid=config.grid,
        text=text,
        module=module,
    )
