"""Which frame of which clip shows each subject of a clip as its reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from alignlab.config.data import FolderConfig
from alignlab.data.decode import ClipError
from alignlab.data.metadata import Row
from alignlab.data.split import Split
from alignlab.data.video import check_clip
from alignlab.errors import UserError
from alignlab.randomness import generator
from alignlab.references.augment import Augmentations
from alignlab.references.record import DroppedSubject, Reason
from alignlab.references.sights import Sight, sights_of, well_seen

MIN_SHARE = 0.1
"""Of the frame that the smallest box around a subject has. RefAlign's code."""
MOST = 3
"""References of a clip: the largest ones. RefAlign's code."""
CROSS_SHARE = 0.23
"""How often a cross pair is taken where there is one. RefAlign's code; a note on the paper says six
regular to four cross pairs."""

MOST_KEPT = 1000
"""Clips whose sights stay in memory; those of others are read again where they are needed."""

Pairs = Literal["regular", "cross", "mixed"]


@dataclass(frozen=True)
class ReferenceSettings:
    """How references are made.

    Args:
        name: folder inside the data set; also in the name of the new metadata.
        pairs: cut from other frames of the same clip, from other clips, or both.
        cross_share: of mixed pairs, how often one of another clip is taken where there is one.
        same_subject: what says that entities of two clips are the same: `entity_names`, or equal
            phrases.
        versions: of each train clip, each with references of its own.
        augment: how regular references of train clips are changed.
        min_share: of the frame that the box around a subject has.
        most: references of a clip.
        other_frames_only: take no frame that the clip is trained on.
        seed: of all draws.
        replace: make references anew that are there.
    """

    name: str = "crops"
    pairs: Pairs = "regular"
    cross_share: float = CROSS_SHARE
    same_subject: Literal["name", "phrase"] = "name"
    versions: int = 1
    augment: Augmentations | None = None
    min_share: float = MIN_SHARE
    most: int = MOST
    other_frames_only: bool = False
    seed: int = 0
    replace: bool = False


@dataclass(frozen=True)
class MaskedClip:
    """A row that has masks.

    Args:
        key: names it.
        row: of the metadata.
        split: that it is dealt to.
        names: of its entities' subjects, in label order.
    """

    key: str
    row: Row
    split: Split
    names: tuple[str, ...]


class Pick(NamedTuple):
    """A reference that is to be cut out.

    Args:
        label: of the entity in its clip.
        source: the clip that it is cut from.
        sight: of it there.
        is_trained: whether its clip is trained on that frame.
    """

    label: int
    source: MaskedClip
    sight: Sight
    is_trained: bool


class _Facts(NamedTuple):
    """What a clip shows: the frames that it is trained on, and well seen sights by label."""

    trained: frozenset[int]
    seen: dict[int, list[Sight]]
    largest: dict[int, float]


def subject_names(key: str, row: Row, same_subject: Literal["name", "phrase"]) -> tuple[str, ...]:
    """The subjects of a row's entities. One that is not named is the same as no other."""
    if same_subject == "phrase":
        return row.entities
    unnamed = (f"{key}:{number + 1}" for number in range(len(row.entities)))
    return row.entity_names or tuple(unnamed)


class PairChooser:
    """Chooses references for the subjects of clips.

    Label images are read when they are needed first.

    Args:
        config: of the data set: which frames clips are trained on.
        settings: see there.
        clips: all that have masks.

    Raises:
        UserError: cross pairs are asked for, and nothing says which subjects are the same.
    """

    def __init__(
        self, config: FolderConfig, settings: ReferenceSettings, clips: Sequence[MaskedClip]
    ) -> None:
        self._config, self._settings = config, settings
        self._facts: dict[str, _Facts] = {}
        self._clips_of: dict[tuple[Split, str], list[MaskedClip]] = {}
        for clip in clips:
            for name in dict.fromkeys(clip.names):
                self._clips_of.setdefault((clip.split, name), []).append(clip)
        is_named = settings.same_subject == "phrase" or any(c.row.entity_names for c in clips)
        if settings.pairs != "regular" and not is_named:
            raise UserError(
                f"--pairs {settings.pairs}: no row says which entities of different clips are the "
                "same: write entity_names (docs/references.md), or take equal phrases for the same "
                "subject with --same-subject phrase"
            )

    def others(self, clip: MaskedClip) -> dict[str, list[MaskedClip]]:
        """Other clips of the same split that show a clip's subjects, by subject."""
        return {
            name: [other for other in self._clips_of[clip.split, name] if other.key != clip.key]
            for name in dict.fromkeys(clip.names)
        }

    def choose(
        self, clip: MaskedClip, versions: int
    ) -> tuple[list[list[Pick]], list[DroppedSubject]]:
        """The references of each version of a clip, in label order, and subjects without any.

        Raises:
            ClipError: a clip or its masks cannot be used.
        """
        found: list[list[Pick]] = []
        why: dict[int, Reason] = {}
        for version in range(versions):
            picks = []
            for label in range(1, len(clip.names) + 1):
                pick = self._pick(clip, label, version)
                if isinstance(pick, Pick):
                    picks.append(pick)
                else:
                    why[label] = pick
            picks.sort(key=lambda pick: -pick.sight.share)  # stable: of equal ones the first
            why |= {pick.label: "smaller" for pick in picks[self._settings.most :]}
            found.append(sorted(picks[: self._settings.most]))
        kept = {pick.label for picks in found for pick in picks}
        largest = self._facts_of(clip).largest
        return found, [
            DroppedSubject(
                label=label,
                phrase=clip.row.entities[label - 1],
                reason=reason,
                share=round(largest[label], 4),
            )
            for label, reason in sorted(why.items())
            if label not in kept
        ]

    def _pick(self, clip: MaskedClip, label: int, version: int) -> Pick | Reason:
        pairs = self._settings.pairs
        if pairs != "regular":
            draw = float(torch.rand((), generator=self._generator(clip, "pair", label, version)))
            if pairs == "cross" or draw < self._settings.cross_share:
                pick = self._of_another_clip(clip, label, version)
                if pick is not None:
                    return pick
        return "no other clip" if pairs == "cross" else self._of_the_clip(clip, label, version)

    def _of_the_clip(self, clip: MaskedClip, label: int, version: int) -> Pick | Reason:
        facts = self._facts_of(clip)
        sights = facts.seen[label]
        if not sights:
            return "too small" if facts.largest[label] else "not seen"
        others = [sight for sight in sights if sight.frame not in facts.trained]
        if not others and self._settings.other_frames_only:
            return "in trained frames alone"
        sight = self._drawn(clip, others or sights, "frame", label, version)
        return Pick(label, clip, sight, is_trained=not others)

    def _of_another_clip(self, clip: MaskedClip, label: int, version: int) -> Pick | None:
        name = clip.names[label - 1]
        clips = self.others(clip)[name]
        if not clips:
            return None
        order = self._order(len(clips), clip, "clip", label)
        # each version begins with another clip
        for place in [*order[version % len(clips) :], *order[: version % len(clips)]]:
            other = clips[place]
            try:
                seen = self._facts_of(other).seen
            except ClipError:
                if self._config.on_bad_video == "error":
                    raise
                continue
            labels = [n + 1 for n, other_name in enumerate(other.names) if other_name == name]
            sights = [sight for number in labels for sight in seen[number]]
            if _is_same_video(clip.row.video, other.row.video):
                first, last = self._span(clip)
                sights = [sight for sight in sights if not first <= sight.frame <= last]
            if sights:
                sight = self._drawn(clip, sights, "frame", label, version)
                return Pick(label, other, sight, is_trained=False)
        return None

    def _drawn(
        self, clip: MaskedClip, sights: list[Sight], purpose: str, label: int, version: int
    ) -> Sight:
        """Versions have different frames, as far as there are any."""
        order = self._order(len(sights), clip, purpose, label)
        return sights[order[version % len(order)]]

    def _order(self, number: int, clip: MaskedClip, purpose: str, label: int) -> list[int]:
        draws = torch.randperm(number, generator=self._generator(clip, purpose, label))
        return [int(place) for place in draws]

    def _generator(self, clip: MaskedClip, purpose: str, *address: int) -> torch.Generator:
        return generator(self._settings.seed, f"reference {purpose} {clip.key}", *address)

    def _span(self, clip: MaskedClip) -> tuple[int, int]:
        trained = self._facts_of(clip).trained
        return min(trained), max(trained)

    def _facts_of(self, clip: MaskedClip) -> _Facts:
        if clip.key not in self._facts:
            if len(self._facts) == MOST_KEPT:
                del self._facts[next(iter(self._facts))]
            row, config = clip.row, self._config
            checked = check_clip(
                row.video, frames=config.frames, fps=config.fps, start_s=row.start_s, seek=False
            )
            seen = sights_of(row, checked.source_size_HW)
            self._facts[clip.key] = _Facts(
                frozenset(checked.frame_indices),
                {n: well_seen(sights, self._settings.min_share) for n, sights in seen.items()},
                {n: max((s.share for s in sights), default=0.0) for n, sights in seen.items()},
            )
        return self._facts[clip.key]


def _is_same_video(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()
