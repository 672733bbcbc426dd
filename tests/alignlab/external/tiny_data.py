"""Data sets of another package, as alignlab's tests install it: right ones and wrong ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from alignlab.data.own import OwnClips, OwnClipsConfig, Split
from alignlab.data.sample import DataFiles, Reference, Sample
from alignlab.errors import UserError

READ = Path("read.txt")
"""Where `Greys` says which clips were made, if it is there."""


class GreysConfig(OwnClipsConfig):
    """Clips of one grey level."""

    name: Literal["greys"] = "greys"
    clips: int = 4
    """Size of either split."""
    wrong: str = ""
    """What is wrong with clip 1; with `first ` before it, with clip 0."""
    level_file: str | None = None
    """File with the first grey level."""


class Greys(OwnClips):
    """Right, unless its settings ask for something else."""

    Config: ClassVar[type[OwnClipsConfig]] = GreysConfig

    def __init__(self, config: Any, split: Split) -> None:
        super().__init__(config, split)
        if config.wrong == "user":
            raise UserError("data.wrong: no greys today")
        if config.wrong == "init":
            raise KeyError("level")
        self._level = 10
        if config.level_file is not None:
            self._level = int(Path(config.level_file).read_text())

    def __len__(self) -> int:
        return 0 if self.config.wrong == "empty" else int(self.config.clips)

    def __getitem__(self, index: int) -> Sample:
        if READ.exists():
            with READ.open("a") as file:
                file.write(f"{self.split}/{index}\n")
        wrong = self.config.wrong.removeprefix("first ")
        if index != (0 if self.config.wrong != wrong else 1):
            wrong = ""
        if wrong == "raises":
            raise RuntimeError("the archive is\nbroken")
        height, width = self.config.size
        frames = self.config.frames + (4 if wrong == "frames" else 0)
        level = self._level + 20 * index + (100 if self.split == "val" else 0)
        video = torch.full((frames, height, width, 3), level, dtype=torch.uint8)
        video[:, : height // 2] += torch.arange(frames, dtype=torch.uint8)[:, None, None, None]
        if wrong == "random":
            video += torch.randint(0, 2, video.shape, dtype=torch.uint8)
        if wrong == "dtype":
            video = video.float()
        masks = torch.zeros(1, frames, height, width, dtype=torch.bool)
        sample = Sample(
            key=self.key(index),
            video_THWC=video,
            caption="other" if wrong == "caption" else self.caption(index),
            references=self.references(index) * (9 if wrong == "references" else 1),
            entities=("a grey",) if wrong == "masks" else (),
            masks_ETHW=masks if wrong == "masks" else None,
        )
        return video if wrong == "sample" else sample  # type: ignore[return-value]

    def caption(self, index: int) -> str:
        return f"grey {index}"

    def references(self, index: int) -> tuple[Reference, ...]:
        height, width = self.config.size
        image = torch.full((height, width, 3), 255, dtype=torch.uint8)
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[8:24, 8:24] = True
        image[mask] = 60 + index
        most = self.config.references[1]
        return (Reference(image, mask, f"grey-{index}", "grey"),)[:most]

    def names(self, index: int) -> tuple[str, ...]:
        return (f"grey-{index}",)[: self.config.references[1]]

    def origin(self, index: int) -> Mapping[str, Any] | None:
        if self.config.wrong == "origin":
            return {"level": None}
        return {"index": index, "split": self.split, "level": self._level}

    @staticmethod
    def files(config: Any) -> DataFiles | None:
        if config.level_file is None:
            return None
        path = Path(config.level_file).resolve()
        return DataFiles(str(path.parent), path.parent, {path.name: path})


class UncachedConfig(OwnClipsConfig):
    """Clips that do not say what they are made from."""

    clips_are_cached: ClassVar[bool] = False

    name: Literal["uncached"] = "uncached"
    clips: int = 4
    """Size of either split."""
    wrong: str = ""
    """As of greys."""
    level_file: str | None = None
    """As of greys."""


class Uncached(Greys):
    Config: ClassVar[type[OwnClipsConfig]] = UncachedConfig

    origin = OwnClips.origin


class NoConfig(Greys):
    Config: ClassVar[type[OwnClipsConfig]] = dict  # type: ignore[assignment]


class NoOrigin(Greys):
    origin = OwnClips.origin


class TwoMinds(Greys):
    Config: ClassVar[type[OwnClipsConfig]] = UncachedConfig


class NoCaption(OwnClips):
    Config: ClassVar[type[OwnClipsConfig]] = GreysConfig

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError


function = print
