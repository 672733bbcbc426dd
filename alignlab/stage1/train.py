"""One Stage 1 training, in the loop of every training (`alignlab.train.Trainer`)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor, nn

from alignlab.config.data import SIZE_STEP
from alignlab.config.paths import user_path
from alignlab.data.registry import build_splits
from alignlab.data.sample import ClipDataset
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.distributed.ranks import Ranks, single_rank
from alignlab.errors import UserError
from alignlab.losses.stage1.folder import Stage1Info, Stage1Teacher, save_stage1
from alignlab.models.text_encoder import cut_captions
from alignlab.models.wan import load_text_encoder, pipeline_grid
from alignlab.progress import warn_once
from alignlab.runs.atomic_files import clear_leftovers, whole_folder
from alignlab.runs.checkpoint_folders import step_of
from alignlab.runs.checksums import write_checksums
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.open_folder import open_folder
from alignlab.runs.prolong import begin_leg
from alignlab.runs.run_folder import RunFolder
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.registry import STAGE1_TASKS
from alignlab.stage1.task import FrozenModels, Stage1Settings, Stage1Task
from alignlab.teachers import Teacher, teacher_from
from alignlab.tracking import Tracker, ask
from alignlab.train import Trainer
from alignlab.training import checkpoint
from alignlab.training.batches import drawn_clip, drawn_clips
from alignlab.training.build_optimizer import build_optimizer, check_optimizer
from alignlab.training.checkpoint import TrainState, Weights
from alignlab.training.clip_memory import ClipMemory
from alignlab.training.encoded import ClipPixels
from alignlab.training.kept_text import encode_ahead
from alignlab.training.measure import logged_costs
from alignlab.training.micro_batches import MicroBatches
from alignlab.training.prefetch import check_wanted
from alignlab.training.step_terms import SampleTerms

Clip = TypeVar("Clip")


@quiet_libraries()
def train_stage1(config: Stage1Config) -> Path:
    """Trains, or resumes, `<output>/<name>`, and returns its subfolder `stage1`.

    That is the folder that a Stage 2 recipe names. A finished training is returned as it is, unless
    the recipe has more steps: then it is prolonged (`alignlab.runs.prolong`).

    Raises:
        UserError: the recipe cannot run here, another command trains it, or a loss stopped being
            finite.
    """
    ranks = single_rank("fp32")
    with ExitStack() as locks:
        opened = open_folder(config, locks, wait=False)
        if opened.is_finished:
            return opened.folder.stage1
        clear_leftovers(opened.folder.path)
        ask(config)
        trainer = stage1_trainer(config, ranks)
        locks.callback(trainer.models.values.flush)
        trainer.encode_texts(0 if opened.newest is None else step_of(opened.newest))
        if opened.newest is not None:
            checkpoint.restore(trainer.state, opened.newest, notes=opened.notes)
        trainer.plan = begin_leg(opened.folder, config, trainer.state.step)
        trainer.fit(opened.folder, opened.newest)
    return opened.folder.stage1


@dataclass
class Stage1State(TrainState):
    """What a Stage 1 training changes.

    Args:
        network: what is trained.
    """

    network: nn.Module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.network.named_parameters()

    def weights(self) -> Weights:
        state = self.network.state_dict()
        weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        return {"network.safetensors": weights}

    def read_weights(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.network.load_state_dict(load_file(folder / "network.safetensors"))


def stage1_trainer(config: Stage1Config, ranks: Ranks) -> "Stage1Trainer":
    """Loads frozen models and data of a recipe, and draws the network's weights.

    Raises:
        UserError: the recipe cannot run here.
    """
    check_optimizer(config.optim, ranks.device)
    train_clips, val_clips = build_splits(config.data, memory=user_path(config.output))
    STAGE1_TASKS[config.stage1.kind].check_data(train_clips, val_clips)
    values = EncodedValues.of(config.data.cache, config.output)
    models = load_frozen_models(config, ranks.device, values)
    notes = (*train_clips.notes, *val_clips.notes)
    if models.text is not None:
        captions = [c.caption(i) for c in (train_clips, val_clips) for i in range(len(c))]
        cut = cut_captions(models.text, captions)
        notes += cut
        for note in cut:
            warn_once(note)
    return Stage1Trainer(config, ranks, models, train_clips, val_clips, notes)


class Stage1Trainer(Trainer):
    """Trains the network of a Stage 1 task.

    Args:
        config: the recipe; the network's weights are drawn by its seed.
        ranks: a single one.
        models: frozen, that the task reads.
        train_clips, val_clips: the data.
        notes: what the result has to say of both.
    """

    config: Stage1Config

    def __init__(
        self,
        config: Stage1Config,
        ranks: Ranks,
        models: FrozenModels,
        train_clips: ClipDataset,
        val_clips: ClipDataset,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.models, self.notes = models, notes
        self.task = STAGE1_TASKS[config.stage1.kind](config.stage1, models, seed=config.seed)
        self.clips = TaskClips(self.task, train_clips, ClipMemory(), config.stage1)
        self.val_clips = TaskClips(self.task, val_clips, ClipMemory(), config.stage1)
        optimizer = build_optimizer(list(self.task.network.parameters()), config.optim)
        super().__init__(config, ranks, Stage1State(optimizer, self.task.network))

    def encode_texts(self, first: int) -> None:
        """Encodes what the steps that are left and the evaluation read; frees the text encoder.

        Not with `model.text_encoder: keep`, nor where texts are not kept.

        Args:
            first: step that is left, from 0: the state may still be that of step 0.

        Raises:
            UserError: an embedding is not finite.
        """
        config, text = self.config, self.models.text
        model = config.text_model
        if model is None or text is None or model.text_encoder == "keep":
            return
        steps, samples = range(first, config.steps), range(config.optim.batch_size)
        drawn = drawn_clips(len(self.clips), config.seed, steps, samples)
        measured = self._measured()
        texts = self.clips.texts(drawn) | self.val_clips.texts(measured, measured=True)
        encode_ahead(self.models.values, text, texts)

    def _measured(self) -> range:
        return range(min(self.config.stage1.val_clips, len(self.val_clips)))

    def micro_batches(self, step: int | None = None) -> MicroBatches[list[Any]]:
        """The clips of a step's batch, drawn as those of a Stage 2 run are."""
        config, count = self.config, len(self.clips)
        step = self.state.step if step is None else step
        samples = range(config.optim.batch_size)
        indices = [drawn_clip(count, config.seed, step, sample) for sample in samples]
        return MicroBatches([lambda: [self.clips[index] for index in indices]])

    def losses(self, batch: Sequence[Any]) -> tuple[Tensor, SampleTerms]:
        loss, terms = self.task.loss(batch)
        return loss, SampleTerms({k: term[None] for k, term in terms.items()})  # of the whole batch

    def finish(self, folder: RunFolder, tracker: Tracker) -> None:
        """Measures the network, writes `stage1/`, and `result.json`."""
        network = self.task.network.eval()
        metrics = self.task.evaluate(self.val_clips[i] for i in self._measured())
        if not all(math.isfinite(value) for value in metrics.values()):
            raise UserError(
                f"the network is not finite after step {self.state.step}: lower optim.lr, "
                f"and remove {folder.path} or choose another name"
            )
        metrics |= logged_costs(folder)
        metrics["params/network"] = float(sum(p.numel() for p in network.parameters()))
        tracker.log(self.config.steps, metrics)
        with whole_folder(folder.stage1) as stage1_folder:
            info = stage1_info(self.config, self.task.shape, self.models.teacher)
            save_stage1(stage1_folder, network, info)
            write_checksums(stage1_folder)
        notes = [*self.notes, *self.state.notes, *self.plan.notes()]
        folder.write_result({"steps": self.config.steps, "metrics": metrics, "notes": notes})


class TaskClips(Generic[Clip]):
    """A data set as its task sees it.

    Args:
        task: encodes one clip at a time, so that a clip never depends on its neighbours.
        dataset: where samples come from.
        memory: encoded clips that are kept.
        settings: the task's.
    """

    def __init__(
        self,
        task: Stage1Task[Clip],
        dataset: ClipDataset,
        memory: ClipMemory[Clip],
        settings: Stage1Settings,
    ) -> None:
        self._task = task
        self._settings = settings
        self._dataset = dataset
        self._memory = memory

    def __len__(self) -> int:
        return len(self._dataset)

    def texts(self, indices: Iterable[int], *, measured: bool = False) -> dict[str, str]:
        """What is embedded of clips, each text with the key of a clip that has it."""
        return {
            text: self._dataset.key(i)
            for i in indices
            for text in self._task.texts(self._settings, self._dataset, i, measured=measured)
        }

    def __getitem__(self, index: int) -> Clip:
        check_wanted()
        clip = self._memory.get(index)
        if clip is None:
            clip = self._task.encode(ClipPixels(self._dataset, index))
            self._memory.put(index, clip)
        return clip


def load_frozen_models(
    config: Stage1Config,
    device: torch.device,
    values: EncodedValues,
    *,
    parks_teacher: bool = True,
) -> FrozenModels:
    """What the recipe's task reads; models whose values are kept are loaded when one is lacking.

    Args:
        config: the recipe.
        device: where they run.
        values: what is kept of them.
        parks_teacher: one that is loaded later is on the device only while it makes features.
    """
    text = None
    teacher = teacher_from(
        config.teacher,
        device=device,
        load=not values.keeps("teacher"),
        is_parked=parks_teacher,
    )
    model = config.text_model
    if model is not None:
        text = load_text_encoder(
            model.path,
            precision=model.precision,
            device="cpu" if model.text_encoder == "cpu" else device,
            load=not values.keeps("text"),
        )
    return FrozenModels(teacher, teacher_grid(config), text, device, values)


def teacher_grid(config: Stage1Config) -> tuple[int, int]:
    """(height, width) in tokens that the teacher is asked for.

    `teachers.<alias>.grid` as in Stage 2. Left out, the token grid of the recipe's model by its
    own strides (of Wan 2.2 TI2V-5B 32 pixels), and without a model that of Wan 2.1.

    Raises:
        UserError: the model cannot be had, or the clips do not fit it.
    """
    if config.teacher.grid is not None:
        return config.teacher.grid
    height, width = config.data.size
    if config.model is None:
        return height // SIZE_STEP, width // SIZE_STEP
    _, *grid_HW = pipeline_grid(config.model.path, config.data.frames, height, width)
    return grid_HW[0], grid_HW[1]


def stage1_info(
    config: Stage1Config,
    module: BaseModel,
    teacher: Teacher,
) -> Stage1Info:
    """What a Stage 1 training writes beside its weights, and a Stage 2 recipe is checked against.

    Args:
        config: of the training.
        module: shape of the network.
        teacher: whose tokens it read.
    """
    row = config.teacher
    assert row.path is not None and row.feature is not None  # the family's, if left out
    return Stage1Info(
        kind=config.stage1.kind,
        teacher=Stage1Teacher(
            family=row.family, path=row.path, feature=row.feature, weights=teacher.digest()
        ),
        teacher_dim=teacher.dim,
        grid=teacher_grid(config),
        text=None if config.text_model is None else config.text_model.path,
        module=module,
    )
