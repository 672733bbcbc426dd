"""What is encoded for the dataset cache, clip by clip, with the frozen models that do it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from alignlab.config.data import CacheConfig
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.data.registry import build_splits
from alignlab.dataset_cache.clip_keys import content_digest, text_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.key import CacheKey
from alignlab.dataset_cache.store import write_reason
from alignlab.distributed.ranks import single_rank
from alignlab.losses import OBJECTIVES
from alignlab.losses.objective import Grid
from alignlab.models.experts import transformer_part
from alignlab.models.wan import checked_pipeline, frozen_parts, patch_size
from alignlab.sampling import negative_text
from alignlab.teachers import DiffusionTeacher, Teacher, teacher_of_clips
from alignlab.training.batches import ClipEncoder
from alignlab.training.clip_memory import ClipMemory
from alignlab.training.encoded import FeatureRead, TokenKind, kept_features
from alignlab.training.teacher_check import check_noise, noise_key


class Clip(NamedTuple):
    """A clip that is to be encoded."""

    split: str
    place: int


class CacheBuilder(ABC):
    """Frozen models and data of trainings that encode alike.

    Args:
        cache: as their recipes say it; it is written to in any case.
        output: of these recipes.
    """

    def __init__(self, cache: CacheConfig, output: str) -> None:
        self.values = EncodedValues.of(cache.model_copy(update={"mode": "write"}), output)

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """How many clips are read, from the first on, by split."""

    @abstractmethod
    def keys(self, clip: Clip) -> list[CacheKey]:
        """What is read of a clip."""

    @abstractmethod
    def rest_keys(self) -> list[CacheKey]:
        """What is read of no clip, or of many."""

    @abstractmethod
    def make(self, clip: Clip) -> None:
        """Makes what is not there."""

    @abstractmethod
    def make_rest(self) -> None:
        """Makes what is of no clip."""

    @abstractmethod
    def make_last(self) -> None:
        """Makes what is of many clips, out of what is kept of each."""

    def clips(self) -> list[Clip]:
        """Those that are read."""
        return [Clip(split, i) for split, count in self.counts().items() for i in range(count)]

    def lacks(self, clip: Clip) -> bool:
        """Whether something of a clip is not there."""
        return any(map(self.values.lacks, self.keys(clip)))

    def used_entries(self) -> set[str]:
        """What is read, by `content_digest`: on any device, and by whatever versions."""
        keys = [*self.rest_keys(), *(key for clip in self.clips() for key in self.keys(clip))]
        return {content_digest(key.kind, key.parts) for key in keys}

    def encode(self, clip: Clip) -> None:
        """Makes what is not there.

        Raises:
            OSError: the disk takes no more.
        """
        self.make(clip)
        self._check_disk()

    def flush(self) -> None:
        """Returns when all that was made is on the disk.

        Raises:
            OSError: it does not take it.
        """
        self.values.flush()
        self._check_disk()

    def written(self) -> int:
        """Bytes of the values that this process has written."""
        return sum(count.written_bytes for count in self.values.cache.counts.values())

    def _check_disk(self) -> None:
        cache = self.values.cache
        if cache.write_error is not None:
            raise OSError(
                f"{cache.path}: the disk takes no more ({write_reason(cache.write_error)}): free "
                "some space, or name another folder as data.cache.path, and build again; what is "
                "there is skipped"
            )


class RunCacheBuilder(CacheBuilder):
    """What runs read: all train clips, and the val clips that they measure.

    Args:
        runs: with the same model, precision, place of the text encoder, data and output.
    """

    def __init__(self, runs: Sequence[RunConfig]) -> None:
        self._runs = runs
        first = runs[0]
        data = first.data
        super().__init__(data.cache, first.output)
        device = single_rank(first.model.precision).device
        folder = checked_pipeline(first.model.path, first.model.expert)
        frozen = frozen_parts(
            folder,
            precision=first.model.precision,
            device=device,
            text_encoder=first.model.text_encoder,
        )
        self._frozen = frozen
        patch = patch_size(folder / transformer_part(first.model.expert))
        self._grid: Grid = frozen.token_grid(patch, data.frames, *data.size)
        splits = build_splits(data, memory=user_path(first.output))
        self._splits = {
            name: ClipEncoder(frozen, split, self.values, ClipMemory(0))
            for name, split in zip(("train", "val"), splits, strict=True)
        }
        self._device = device
        self._teachers: dict[str, Teacher | DiffusionTeacher] = {}
        self._reads = {"train": self._aligned(), "val": self._measured()}

    def counts(self) -> dict[str, int]:
        measured = max(run.eval.num_read_clips for run in self._runs)
        return {
            "train": len(self._splits["train"]),
            "val": min(measured, len(self._splits["val"])),
        }

    def keys(self, clip: Clip) -> list[CacheKey]:
        return self._splits[clip.split].cache_keys(clip.place, self._reads[clip.split])

    def rest_keys(self) -> list[CacheKey]:
        texts = [text_key(text, self._frozen.text.parts) for text in self._prompts()]
        noise = [noise_key(read, self._runs[0].data) for _, read in self._noise_reads()]
        return texts + noise + [self._splits["train"].centre_key(r) for r in self._centred()]

    def make(self, clip: Clip) -> None:
        encoded = self._splits[clip.split][clip.place]
        if not self._keeps_features:
            return
        for read in self._reads[clip.split]:
            if read.kind == "video" or encoded.pixels.names:
                # not centred, which needs other clips as well
                kept_features(self.values, read, encoded.pixels, lambda: encoded)

    def make_rest(self) -> None:
        """Prompts that stand for none, and features of noise."""
        for prompt, where in self._prompts().items():
            self._splits["train"].text(prompt, where=where)
        for where, read in self._noise_reads() if self._keeps_features else ():
            check_noise(where, read, self._runs[0].data, self.values)

    def make_last(self) -> None:
        """What features are centred by."""
        clips = self._splits["train"]
        for read in self._centred() if self._keeps_features else ():
            if self.values.lacks(clips.centre_key(read)):
                clips.centre_of(read)

    @property
    def _keeps_features(self) -> bool:
        """Or the runs make them, and no teacher is loaded here."""
        return self.values.keeps("teacher")

    def _centred(self) -> list[FeatureRead]:
        """Diffusion teachers whose features are read centred."""
        return [
            read
            for read in self._reads["train"]
            if isinstance(read.teacher, DiffusionTeacher) and read.teacher.is_centred
        ]

    def _prompts(self) -> dict[str, str]:
        """Texts of no clip, each with what has it."""
        negative = {negative_text(run.eval.negative_prompt) for run in self._runs}
        return {**dict.fromkeys(sorted(negative), "eval.negative_prompt"), "": "the empty prompt"}

    def _noise_reads(self) -> Iterator[tuple[str, FeatureRead]]:
        """Teachers that runs look at first, as they do."""
        for run in self._runs:
            used = {alias for o in run.objectives.values() for alias in o.teachers}
            for alias in filter(None, {*used, run.measured_against}):
                yield f"teachers.{alias}", self._read(run, alias, "video")

    def _aligned(self) -> list[FeatureRead]:
        """What objectives read of train clips."""
        reads: dict[FeatureRead, None] = {}
        for run in self._runs:
            for objective in run.objectives.values():
                kind = OBJECTIVES[objective.name].tokens
                for alias in objective.teachers:
                    reads[self._read(run, alias, kind)] = None
        return list(reads)

    def _measured(self) -> list[FeatureRead]:
        """What evaluations read of val clips."""
        reads: dict[FeatureRead, None] = {}
        for run in self._runs:
            alias = run.measured_against
            if alias is None:
                continue
            reads[self._read(run, alias, "video")] = None
            if not self._teacher(run, alias).is_video:
                reads[self._read(run, alias, "reference")] = None
        return list(reads)

    def _read(self, run: RunConfig, alias: str, kind: TokenKind) -> FeatureRead:
        own_HW = run.teachers[alias].grid if kind == "video" else None
        return FeatureRead(self._teacher(run, alias), kind, own_HW or self._grid[1:])

    def _teacher(self, run: RunConfig, alias: str) -> Teacher | DiffusionTeacher:
        config = run.teachers[alias]
        name = config.model_dump_json(exclude={"shuffle"})  # entries are as they are
        if name not in self._teachers:
            self._teachers[name] = teacher_of_clips(
                config,
                self._runs[0].data,
                self._frozen,
                alias=alias,
                device=self._device,
                load=False,
                is_parked=False,
            )
        return self._teachers[name]
