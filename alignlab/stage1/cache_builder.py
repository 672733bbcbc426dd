"""What a Stage 1 training reads of frozen models, for `alignlab cache build`."""

from alignlab.config.paths import user_path
from alignlab.data.registry import build_splits
from alignlab.dataset_cache.clip_keys import text_key
from alignlab.dataset_cache.key import CacheKey
from alignlab.distributed.ranks import single_rank
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.registry import STAGE1_TASKS
from alignlab.stage1.train import load_frozen_models
from alignlab.training.cache_builder import CacheBuilder, Clip
from alignlab.training.encoded import ClipPixels, feature_key, kept_features
from alignlab.training.kept_text import kept_text


class Stage1CacheBuilder(CacheBuilder):
    """The teacher's features of all train clips and of the val clips that are measured, and the
    texts that the task asks about them.

    Args:
        config: of the training.
    """

    def __init__(self, config: Stage1Config) -> None:
        super().__init__(config.data.cache, config.output)
        self._config = config
        self._task = STAGE1_TASKS[config.stage1.kind]
        train_clips, val_clips = build_splits(config.data, memory=user_path(config.output))
        self._task.check_data(train_clips, val_clips)
        self._splits = {"train": train_clips, "val": val_clips}
        device = single_rank("fp32").device
        self._models = load_frozen_models(config, device, self.values, parks_teacher=False)

    def counts(self) -> dict[str, int]:
        train, val = (len(split) for split in self._splits.values())
        return {"train": train, "val": min(val, self._config.stage1.val_clips)}

    def keys(self, clip: Clip) -> list[CacheKey]:
        keys = [feature_key(self._models.read, self._pixels(clip))]
        if self._models.text is not None:
            keys += [text_key(text, self._models.text.parts) for text in self._texts(clip)]
        return keys

    def rest_keys(self) -> list[CacheKey]:
        return []

    def make(self, clip: Clip) -> None:
        pixels = self._pixels(clip)
        kept_features(self.values, self._models.read, pixels)
        if self._models.text is not None:
            for text in self._texts(clip):
                kept_text(self.values, self._models.text, text, pixels.key)

    def make_rest(self) -> None:
        """There is nothing."""

    def make_last(self) -> None:
        """There is nothing."""

    def _pixels(self, clip: Clip) -> ClipPixels:
        return ClipPixels(self._splits[clip.split], clip.place)

    def _texts(self, clip: Clip) -> tuple[str, ...]:
        dataset, is_measured = self._splits[clip.split], clip.split == "val"
        return self._task.texts(self._config.stage1, dataset, clip.place, measured=is_measured)
