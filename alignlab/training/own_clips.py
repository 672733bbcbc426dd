"""What a training loop of one's own gives to `alignlab.Alignment`: clips, and recorded tokens.

Shape letters: B batch, T pixel frames, H, W pixels, K references, L text tokens, N tokens, D width.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from alignlab.config.run import MIN_VIDEO_FRAMES
from alignlab.errors import UserError, shown
from alignlab.foreign_code import call_foreign
from alignlab.kernels.host_copy import to_device
from alignlab.losses.gate import is_normalized
from alignlab.losses.objective import Grid, Objective
from alignlab.models.taps import BlockTokens, Kind, Recorded, Taps, WanTransformer, block_tokens
from alignlab.teachers import DiffusionTeacher, Teacher
from alignlab.training.batches import is_blank
from alignlab.training.encoded import FeatureRead
from alignlab.training.teacher_check import checked_tokens

Place = Literal["after", "before"]
"""Where reference frames lie in the transformer's sequence: after the video's frames or before."""


@dataclass(frozen=True)
class Clips:
    """What the samples of a batch show. Left out: what no objective reads.

    Pixels are those that the latents were encoded from, at any size, on any device; masks and
    reference images are best left on the CPU.

    Args:
        sigma_B: noise level of each sample, 0 (clean) to 1 (noise): a thousandth of Wan's
            `timestep`.
        latent_shape: (frames, height, width) of the video's latents, without reference frames:
            `latents.shape[2:]`.
        frames_BTHWC: uint8 RGB, 0 to 255, every pixel frame of the video: 1 + 4 (frames - 1) of
            them for Wan's autoencoder.
        references: per sample the pictures whose latents the transformer saw as reference frames,
            in their order, uint8 (K, H, W, 3) or None; K may differ. A sample whose references were
            dropped in this step has None.
        names: per sample the subject of each of its references. Pictures with one name show one
            subject, and are not pushed apart. None: each shows another.
        reference_masks: per sample where the subject of each reference is, bool (K, H, W).
        masks_BTHW: bool, where any entity that the caption names is visible, in every pixel frame.
        text_BLD: embeddings of the full captions by the transformer's text encoder, zeros after the
            last token; also of captions that were dropped in this step.
        undecided_BTHW: bool, pixels of which it is not known whether an entity is there, none of
            them in `masks_BTHW`. None: there are none.
        latents_BCTHW: clean latents of the video, without reference frames, as the flow loss has
            them, on the device of the transformer.
        step_sigma_S: noise levels of all samples of the optimizer step, over its micro-batches and
            ranks, in any order, on the device of `sigma_B`.

    Raises:
        UserError: a field has another shape, dtype or range, or fields do not go together.
    """

    sigma_B: Tensor
    latent_shape: Sequence[int]
    frames_BTHWC: Tensor | None = None
    references: Sequence[Tensor | None] | None = None
    names: Sequence[Sequence[str]] | None = None
    reference_masks: Sequence[Tensor | None] | None = None
    masks_BTHW: Tensor | None = None
    text_BLD: Tensor | None = None
    undecided_BTHW: Tensor | None = None
    latents_BCTHW: Tensor | None = None
    step_sigma_S: Tensor | None = None

    def __post_init__(self) -> None:
        sigma_B = self.sigma_B
        if not isinstance(sigma_B, Tensor) or sigma_B.ndim != 1 or not sigma_B.is_floating_point():
            raise _unlike("sigma_B", "one number per sample, (B,) and floating", sigma_B)
        if sigma_B.device.type == "cpu":
            self.check_sigma()
        if len(self.latent_shape) != 3:
            raise _unlike("latent_shape", "(frames, height, width)", self.latent_shape)
        batch = len(sigma_B)
        frames, masks = self.frames_BTHWC, self.masks_BTHW
        if frames is not None:
            what = "uint8 (B, T, H, W, 3), 0 to 255"
            _check("frames_BTHWC", what, frames, [torch.uint8], (batch, None, None, None, 3))
            _check_lengths(frames.shape[1], int(self.latent_shape[0]))
        if masks is not None:
            length = None if frames is None else frames.shape[1]
            what = f"bool (B, T, H, W) with T={length}" if length else "bool (B, T, H, W)"
            _check("masks_BTHW", what, masks, [torch.bool], (batch, length, None, None))
        if self.undecided_BTHW is not None:
            if masks is None:
                raise UserError("Clips.undecided_BTHW: says nothing without masks_BTHW; give both")
            what = f"bool {tuple(masks.shape)}, as masks_BTHW"
            _check("undecided_BTHW", what, self.undecided_BTHW, [torch.bool], tuple(masks.shape))
        dtypes = [torch.float32, torch.bfloat16, torch.float16]
        if self.text_BLD is not None:
            what = "floating (B, L, D)"
            _check("text_BLD", what, self.text_BLD, dtypes, (batch, None, None))
        if self.latents_BCTHW is not None:
            size = tuple(int(length) for length in self.latent_shape)
            what = f"floating (B, C, T, H, W), the last three {size}"
            _check("latents_BCTHW", what, self.latents_BCTHW, dtypes, (batch, None, *size))
        if self.step_sigma_S is not None:
            _check("step_sigma_S", "floating (S,)", self.step_sigma_S, [sigma_B.dtype], (None,))
        self._check_references(batch)

    def check_sigma(self) -> None:
        """Refuses what is no noise level; waits for the device.

        Raises:
            UserError: it names one.
        """
        wrong = [value for value in self.sigma_B.tolist() if not 0 <= value <= 1]
        if wrong:
            raise UserError(
                f"Clips.sigma_B: {wrong[0]:g} is no noise level from 0 to 1; divide timesteps by "
                "1000"
            )

    def _check_references(self, batch: int) -> None:
        per_sample = {"names": self.names, "reference_masks": self.reference_masks}
        if self.references is None:
            for name, value in per_sample.items():
                if value is not None:
                    raise UserError(f"Clips.{name}: there are no references that it could be of")
            return
        for name, value in {"references": self.references, **per_sample}.items():
            if value is not None and len(value) != batch:
                raise UserError(f"Clips.{name}: {len(value)} samples, and sigma_B has {batch}")
        for row, images in enumerate(self.references):
            count = 0 if images is None else len(images)
            if images is not None:
                what = "uint8 (K, H, W, 3), 0 to 255, or None"
                shape = (None, None, None, 3)
                _check(f"references[{row}]", what, images, [torch.uint8], shape)
            if self.names is not None and len(self.names[row]) != count:
                raise UserError(
                    f"Clips.names[{row}]: {len(self.names[row])} names, and the sample has {count} "
                    "references"
                )
            masks = None if self.reference_masks is None else self.reference_masks[row]
            if masks is not None and count:
                what = f"bool (K, H, W) with K={count}"
                shape_KHW = (count, None, None)
                _check(f"reference_masks[{row}]", what, masks, [torch.bool], shape_KHW)
            elif count and self.reference_masks is not None:
                raise UserError(
                    f"Clips.reference_masks[{row}]: None, and the sample has {count} references"
                )


def _check(
    name: str, what: str, value: Any, dtypes: Collection[torch.dtype], shape: Sequence[int | None]
) -> None:
    is_fit = isinstance(value, Tensor) and value.dtype in dtypes and value.ndim == len(shape)
    if not is_fit or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
        raise _unlike(name, what, value)


def _check_lengths(frames: int, latent_frames: int) -> None:
    """Refuses pixel frames that are not the first one and as many for each later latent frame."""
    later = max(1, latent_frames - 1)
    if frames < latent_frames or (frames - 1) % later or (latent_frames == 1 and frames > 1):
        raise UserError(
            f"Clips.frames_BTHWC: {frames} frames are not those of {latent_frames} latent frames: "
            f"give all that were encoded, {1 + 4 * (latent_frames - 1)} for Wan's autoencoder"
        )


def _unlike(name: str, what: str, value: Any) -> UserError:
    given = shown(value)
    if isinstance(value, Tensor):
        given = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return UserError(f"Clips.{name}: expected {what}, got {given}")


NEEDED = {"text": "text_BLD", "masks": "masks_BTHW", "foreground": "reference_masks"}
"""Field of `Clips` by what an objective needs."""
OF_VIDEO = {"teacher": "frames_BTHWC", "latents": "latents_BCTHW"}
"""Field of `Clips` by what objectives on video tokens read."""


class GivenClips:
    """`Clips` as objectives read them (`alignlab.training.batch_context.ClipContents`).

    Args:
        clips: from the loop.
        teachers: by alias, for messages.
    """

    def __init__(self, clips: Clips, teachers: Mapping[str, Teacher | DiffusionTeacher]) -> None:
        self.clips = clips
        self._teachers = teachers

    def check(self, alias: str, objective: Objective) -> None:
        """Refuses clips that lack what an objective reads.

        Raises:
            UserError: it names the field.
        """
        clips = self.clips
        fields = [NEEDED[need] for need in sorted(objective.needs)]
        if objective.tokens == "reference":
            fields.insert(0, "references")
        elif objective.reads in OF_VIDEO:
            fields.insert(0, OF_VIDEO[objective.reads])
        if is_normalized(objective.config.gate):
            fields.append("step_sigma_S")
        for name in fields:
            if getattr(clips, name) is None:
                raise UserError(
                    f"objectives.{alias}: {objective.config.name} reads Clips.{name}, which is "
                    "not given"
                )

    @property
    def sigma_B(self) -> Tensor:
        return self.clips.sigma_B

    @property
    def step_sigma_S(self) -> Tensor | None:
        return self.clips.step_sigma_S

    @property
    def latents_BCTHW(self) -> Tensor | None:
        return self.clips.latents_BCTHW

    @property
    def caption_BLD(self) -> Tensor | None:
        return self.clips.text_BLD

    @cached_property
    def references(self) -> list[Tensor]:
        """Of each sample, uint8 (K, H, W, 3); K is 0 where it has none."""
        none = torch.empty(0, 1, 1, 3, dtype=torch.uint8)
        given = self.clips.references or [None] * len(self.sigma_B)
        return [none if images is None else images for images in given]

    @cached_property
    def names(self) -> list[list[str]]:
        if self.clips.names is not None:
            return [list(names) for names in self.clips.names]
        return [
            [f"{row}/{slot}" for slot in range(len(images))]
            for row, images in enumerate(self.references)
        ]

    @cached_property
    def reference_masks(self) -> list[Tensor]:
        given = self.clips.reference_masks or [None] * len(self.sigma_B)
        none = torch.zeros(0, 1, 1, dtype=torch.bool)
        return [none if masks is None else masks.cpu() for masks in given]

    @cached_property
    def referenced_B(self) -> Tensor:
        return torch.tensor([self._shows(row) for row in range(len(self.references))])

    def _shows(self, row: int) -> bool:
        """Whether one of a sample's references is not blank."""
        images, masks = self.references[row].cpu(), self.reference_masks[row]
        if not len(masks):
            masks = torch.ones(images.shape[:3], dtype=torch.bool)
        return not all(is_blank(i, m) for i, m in zip(images, masks, strict=True))

    @cached_property
    def masks(self) -> list[Tensor | None]:
        assert self.clips.masks_BTHW is not None  # `check`
        return list(self.clips.masks_BTHW.cpu()[:, None])

    @cached_property
    def undecided(self) -> list[Tensor | None]:
        undecided_BTHW = self.clips.undecided_BTHW
        return [None] * len(self.sigma_B) if undecided_BTHW is None else list(undecided_BTHW.cpu())

    def features(self, read: FeatureRead) -> list[Tensor | None]:
        """Made of each clip by itself, as in a run: they do not depend on what else is there."""
        if read.kind == "reference":
            return [
                self.encoded(read, images) if len(images) else None for images in self.references
            ]
        frames = self.clips.frames_BTHWC
        assert frames is not None  # `check`
        return [self.encoded(read, frames_THWC) for frames_THWC in frames]

    def encoded(self, read: FeatureRead, frames_THWC: Tensor) -> Tensor:
        """A teacher's tokens of one clip or of the references of one, (T, P, D).

        Raises:
            UserError: a teacher of one's own raised something, or gave something else than it was
                asked for; or a video teacher gets too few frames.
        """
        teacher, count = read.teacher, len(frames_THWC)
        assert not isinstance(teacher, DiffusionTeacher)  # refused by `attach`
        if teacher.is_video and count < MIN_VIDEO_FRAMES:
            raise UserError(
                f"Clips.frames_BTHWC: a video teacher needs {MIN_VIDEO_FRAMES} frames or more, not "
                f"{count}"
            )
        frames_BTHWC = frames_THWC[None]
        with torch.no_grad():
            if isinstance(teacher, Teacher):
                tokens_TPD = teacher.encode(frames_BTHWC, read.grid_HW).tokens_BTPD[0]
            else:
                what = f"teachers.{self.name_of(read)}: encode"
                found = call_foreign(what, teacher.encode, frames_BTHWC, read.grid_HW)
                tokens_TPD = checked_tokens(what, teacher, found, count, read.grid_HW)
        return to_device(tokens_TPD, self.sigma_B.device)

    def name_of(self, read: FeatureRead) -> str:
        """Alias of a teacher that is read."""
        return next(name for name, one in self._teachers.items() if one is read.teacher)


class RecordedTokens:
    """The tokens of the forward passes inside the last `recording`, cut by sample and kind.

    Args:
        model: the Wan transformer.
        taps: on its blocks.
        references: where reference frames lie in its sequence; None: there are none.
    """

    def __init__(self, model: WanTransformer, taps: Taps, references: Place | None) -> None:
        _, self._patch_height, self._patch_width = model.config["patch_size"]
        self._taps = taps
        self._place = references
        self._recorded: Recorded | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps what the taps catch inside, and forgets what was kept.

        Raises:
            UserError: the taps are not attached.
        """
        if not self._taps.is_attached:
            raise UserError("alignment is detached: call alignment.attach() before recording")
        with self._taps.recording() as self._recorded:
            yield

    def forget(self) -> None:
        """Drops what was kept."""
        self._recorded = None

    def take(
        self, clips: Clips, read: Collection[Kind], kinds: Mapping[int, Collection[Kind]]
    ) -> tuple[dict[int, BlockTokens], Grid]:
        """Gives the recorded tokens once, and the grid of the video's.

        Args:
            clips: of these samples.
            read: which kinds of token are read in this step.
            kinds: by block, which are ever read.

        Raises:
            UserError: nothing was recorded, or something else than these clips.
        """
        recorded, self._recorded = self._recorded, None
        if recorded is None or not all(recorded.outputs.values()):
            raise UserError(
                "no forward pass was recorded: call the transformer inside `with "
                "alignment.recording():`, once for each call of alignment; a compiled one must be "
                "attached before its first call"
            )
        frames, height, width = (int(size) for size in clips.latent_shape)
        if height % self._patch_height or width % self._patch_width:
            raise UserError(
                f"Clips.latent_shape: {height}x{width} does not divide into patches of "
                f"{self._patch_height}x{self._patch_width}"
            )
        grid = (frames, height // self._patch_height, width // self._patch_width)
        counts = [0] * len(clips.sigma_B)
        if "reference" in read:
            counts = [0 if images is None else len(images) for images in clips.references or ()]
        samples, attention = (
            {
                block: self._cut([row for output in outputs for row in output], grid, counts)
                for block, outputs in found.items()
            }
            for found in (recorded.outputs, recorded.attention)
        )
        return block_tokens(samples, grid, kinds, attention), grid

    def _cut(self, rows: list[Tensor], grid: Grid, counts: list[int]) -> list[Tensor]:
        """Of each sample its video's tokens and then those of its references, (N, ...)."""
        if len(rows) != len(counts):
            raise UserError(
                f"Clips.sigma_B: {len(counts)} samples, and {len(rows)} went through the "
                "transformer inside recording()"
            )
        per_frame = grid[1] * grid[2]
        found = []
        for number, (tokens_ND, count) in enumerate(zip(rows, counts, strict=True)):
            extra, odd = divmod(len(tokens_ND) - grid[0] * per_frame, per_frame)
            if odd or extra < 0 or (extra and self._place is None):
                raise UserError(
                    f"Clips.latent_shape: the video has {grid[0]}x{grid[1]}x{grid[2]} tokens, and "
                    f"the transformer's sequence {len(tokens_ND)}; give the shape of its latents, "
                    "and if reference frames lie beside it, attach(..., references='after')"
                )
            if count > extra:
                raise UserError(
                    f"Clips.references[{number}]: {count} pictures, and the transformer's sequence "
                    f"has {extra} latent frames besides the video's"
                )
            first, video = grid[0] * per_frame, tokens_ND
            if self._place == "before":
                video, refs = tokens_ND[extra * per_frame :], tokens_ND[: count * per_frame]
                found.append(torch.cat([video, refs]))
            else:
                found.append(tokens_ND[: first + count * per_frame])
        return found
