"""Reference images beside the video, through the unmodified diffusers Wan transformer.

References are extra latent frames after the video's (RefAlign's layout): the RoPE time index goes
on, spatial indices stay, the timestep modulation is the video's (or that of t = 0:
`reference_timestep`), self-attention is joint. Where a sample has none, either nothing or one frame
of zeros stands in their place (`absent_references`).
Shape letters: B batch, C channels, T latent frames, H height, W width, K references, L text
tokens, D width, N tokens.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from alignlab.config.model import ModelConfig
from alignlab.errors import UserError
from alignlab.losses.objective import Grid
from alignlab.models.attention import SameDtypeAttention, VideoTextAttention
from alignlab.models.taps import BlockTokens, Kind, Recorded, Taps, block_tokens


@dataclass(frozen=True)
class Output:
    """What one forward pass gives.

    Args:
        velocity_BCTHW: fp32 prediction for the video's latent frames; the references' is dropped.
        taps: tapped tokens by block index, carrying the gradient.
        outputs: by block index, what the tapped blocks put out, (G, L, D) of each group of samples
            that ran together, of which `taps` are copies. Empty where there is no gradient.
    """

    velocity_BCTHW: Tensor
    taps: dict[int, BlockTokens]
    outputs: dict[int, list[Tensor]]


@dataclass(frozen=True)
class OtherWeights:
    """Weights that a forward pass takes in place of the transformer's, which stay where they are.

    Args:
        weights: by the name of their parameter; what is not among them is the transformer's own.
        taps: of the transformer; which the branch was given as one of its `others`.
        kinds: by block, which of its tokens they keep.
    """

    weights: Mapping[str, Tensor]
    taps: Taps
    kinds: Mapping[int, Collection[Kind]]

    def of(self, transformer: nn.Module) -> Callable[..., Any]:
        """What to call in place of the transformer."""
        weights = dict(self.weights)
        return lambda **inputs: functional_call(transformer, weights, (), inputs)


class ReferenceBranch:
    """Runs the transformer on videos with references, and taps its blocks.

    A context manager: attention processors (`alignlab.models.attention`) and hooks are in place
    between enter and exit, and the transformer is then as it was. Samples with equally many extra
    frames run together, so there is no mask, no attention backend needs one, and no sample sees its
    neighbours.

    With gradient checkpointing, run the backward pass before a forward pass with another video
    size: torch.utils.checkpoint otherwise raises, because blocks run again with the newer size.

    Args:
        transformer: with or without LoRA, FSDP2 or compiled blocks.
        text_to_references: let reference tokens attend to the text. RefAlign's code does not.
        absent_references: what a sample without references has in their place: nothing (`none`), or
            one latent frame of zeros (`zero`, RefAlign's code). Its tokens are never among the
            taps: they show no subject.
        reference_timestep: of the tokens that follow the video's: the video's own (`video`,
            RefAlign), or `zero`, which is said token by token: as Wan 2.2 TI2V-5B, whose timesteps
            are expanded, is told of a clean first frame.
        blocks: 0-based indices of the blocks to tap.
        kinds: by block, which of its tokens the taps keep; None: all. At 81 frames of 480x832 the
            video tokens of one block of Wan 1.3B take 0.1 GB in bf16.
        taps: of this transformer, in place of `blocks`: their hooks come and go with the branch.
        others: of other weights (`OtherWeights`), whose hooks do so as well.

    Raises:
        UserError: a block index is out of range, the patches span several latent frames, or the
            transformer attends to an image beside the text (image-to-video).
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        *,
        text_to_references: bool = False,
        absent_references: Literal["none", "zero"] = "none",
        reference_timestep: Literal["video", "zero"] = "video",
        blocks: Sequence[int] = (),
        kinds: Mapping[int, Collection[Kind]] | None = None,
        taps: Taps | None = None,
        others: Sequence[Taps] = (),
    ) -> None:
        self._transformer = transformer
        self._others = tuple(others)
        self.absent_references = absent_references
        self._clean_references = reference_timestep == "zero"
        self._joint_attention = SameDtypeAttention()
        self._text_attention = SameDtypeAttention() if text_to_references else VideoTextAttention()
        self._originals: list[tuple[Any, Any]] = []
        self._taps = Taps(transformer, blocks) if taps is None else taps
        self._kinds = kinds
        self._entered = False
        patch = tuple(transformer.config["patch_size"])
        if patch[0] != 1:
            raise UserError(f"model.path: the transformer's patches {patch} span several frames")
        if transformer.config["added_kv_proj_dim"] is not None:
            raise UserError("model.path: the transformer is image-to-video, not text-to-video")

    @classmethod
    def of(
        cls,
        transformer: WanTransformer3DModel,
        config: ModelConfig,
        *,
        blocks: Sequence[int] = (),
        kinds: Mapping[int, Collection[Kind]] | None = None,
        taps: Taps | None = None,
        others: Sequence[Taps] = (),
    ) -> Self:
        """The branch as a recipe trains it; see the class for what it raises."""
        return cls(
            transformer,
            text_to_references=config.text_to_references,
            absent_references=config.absent_references,
            reference_timestep=config.reference_timestep,
            blocks=blocks,
            kinds=kinds,
            taps=taps,
            others=others,
        )

    def __enter__(self) -> Self:
        for taps in (self._taps, *self._others):
            taps.__enter__()
        for block in self._transformer.blocks:
            pairs = ((block.attn1, self._joint_attention), (block.attn2, self._text_attention))
            for attention, processor in pairs:
                original = attention.processor
                self._originals.append((attention, original))
                processor._attention_backend = original._attention_backend
                processor._parallel_config = original._parallel_config
                attention.set_processor(processor)
        self._entered = True
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for attention, original in self._originals:
            attention.set_processor(original)
        self._originals = []
        for taps in (self._taps, *self._others):
            taps.__exit__(exc_type, exc, traceback)
        self._entered = False

    def __call__(
        self,
        latents_BCTHW: Tensor,
        timesteps_B: Tensor,
        text_BLD: Tensor,
        references: Sequence[Tensor],
        *,
        capture: bool = True,
        other: OtherWeights | None = None,
        tokens_BN: Tensor | None = None,
    ) -> Output:
        """Predicts the velocity of every video.

        Args:
            latents_BCTHW: noisy video latents.
            timesteps_B: 0..1000, one per sample.
            text_BLD: prompt embeddings.
            references: per sample (K, C, H, W) clean latents, K >= 0, of the video's size.
            capture: whether to return the tapped tokens.
            other: weights in place of the transformer's own, and what is tapped of them.
            tokens_BN: timesteps of the video's tokens, where they differ within a sample (more
                memory than one each); references keep `timesteps_B`, or have 0.

        Raises:
            ValueError: shapes do not fit each other, the patches or the position table.
        """
        if not self._entered:
            raise RuntimeError("call ReferenceBranch inside its with-block")
        extra = [self._extra_frames(reference) for reference in references]
        grid = self._token_grid(latents_BCTHW, extra)
        if not len(timesteps_B) == len(text_BLD) == len(references) == len(latents_BCTHW):
            raise ValueError("latents, timesteps, text and references differ in batch size")
        if isinstance(self._text_attention, VideoTextAttention):
            self._text_attention.num_video_tokens = grid[0] * grid[1] * grid[2]
        dtype = self._transformer.patch_embedding.weight.dtype
        (forward, taps, kinds), area = self._passed_through(other), grid[1] * grid[2]
        velocity: dict[int, Tensor] = {}
        passes: list[tuple[list[int], Recorded]] = []
        for group in _groups([len(e) for e in extra], alone=_communicates(self._transformer)):
            sequences = [
                torch.cat([latents_BCTHW[i], extra[i].transpose(0, 1)], dim=1) for i in group
            ]
            counts = (grid[0] * area, len(extra[group[0]]) * area)
            recording: AbstractContextManager[Recorded] = (
                taps.recording() if capture else nullcontext(Recorded({}, {}))
            )
            with recording as recorded:
                out = forward(
                    hidden_states=torch.stack(sequences).to(dtype),
                    timestep=self._timesteps(group, timesteps_B, tokens_BN, counts),
                    encoder_hidden_states=torch.stack([text_BLD[i] for i in group]).to(dtype),
                    return_dict=False,
                )[0]
            velocity.update(zip(group, out[:, :, : grid[0]].float(), strict=True))
            passes.append((group, recorded))
        outputs, placed = (_without_zeros(of, references, grid) for of in _by_sample(passes))
        velocity_BCTHW = torch.stack([velocity[i] for i in range(len(references))])
        tapped = block_tokens(outputs, grid, kinds, placed)
        return Output(velocity_BCTHW, tapped, _by_group(passes))

    def _passed_through(
        self, other: OtherWeights | None
    ) -> tuple[Callable[..., Any], Taps, Mapping[int, Collection[Kind]] | None]:
        """What a forward pass calls, what taps it, and which tokens these keep."""
        if other is None:
            return self._transformer, self._taps, self._kinds
        return other.of(self._transformer), other.taps, other.kinds

    def _timesteps(
        self,
        group: Sequence[int],
        timesteps_B: Tensor,
        tokens_BN: Tensor | None,
        counts: tuple[int, int],
    ) -> Tensor:
        """Of samples that run together: one each, (G,), or one for each token, (G, N).

        Args:
            group: their places in the batch.
            timesteps_B: one per sample.
            tokens_BN: of the video's tokens, where they differ.
            counts: number of the video's tokens, and of those that follow.
        """
        video, others = counts
        if tokens_BN is None and not (self._clean_references and others):
            return torch.stack([timesteps_B[i] for i in group])
        rows = []
        for i in group:
            own = timesteps_B[i]
            rest = torch.zeros_like(own) if self._clean_references else own
            first = own.expand(video) if tokens_BN is None else tokens_BN[i]
            rows.append(torch.cat([first, rest.expand(others)]))
        return torch.stack(rows)

    def _extra_frames(self, reference_KCHW: Tensor) -> Tensor:
        """The clean latent frames that follow a sample's video."""
        if len(reference_KCHW) or self.absent_references == "none":
            return reference_KCHW
        return reference_KCHW.new_zeros(1, *reference_KCHW.shape[1:])

    def _token_grid(self, latents_BCTHW: Tensor, references: Sequence[Tensor]) -> Grid:
        _, channels, frames, height, width = latents_BCTHW.shape
        _, patch_h, patch_w = self._transformer.config["patch_size"]
        if height % patch_h or width % patch_w:
            raise ValueError(f"latents {height}x{width} do not divide into {patch_h}x{patch_w}")
        for reference in references:
            if reference.ndim != 4 or reference.shape[1:] != (channels, height, width):
                raise ValueError(
                    f"reference latents {tuple(reference.shape)} do not match "
                    f"(K, {channels}, {height}, {width})"
                )
        grid = (frames, height // patch_h, width // patch_w)
        longest = max(frames + max(len(r) for r in references), grid[1], grid[2])
        if longest > self._transformer.rope.max_seq_len:
            raise ValueError(
                f"{longest} positions exceed the transformer's {self._transformer.rope.max_seq_len}"
            )
        return grid


Passes = Sequence[tuple[Sequence[int], Recorded]]
"""Of each forward pass the samples in it, and what was recorded of it."""


def _by_sample(passes: Passes) -> Iterator[dict[int, dict[int, Tensor]]]:
    """By block and sample, what the blocks put out, then queries and keys of their attention."""
    for recorded in (
        [(group, of.outputs) for group, of in passes],
        [(group, of.attention) for group, of in passes],
    ):
        found: dict[int, dict[int, Tensor]] = {}
        for group, tensors in recorded:
            for block, (tokens,) in tensors.items():
                found.setdefault(block, {}).update(zip(group, tokens, strict=True))
        yield found


def _by_group(passes: Passes) -> dict[int, list[Tensor]]:
    """What the blocks put out, by block and pass; nothing where no gradient keeps it anyway."""
    found: dict[int, list[Tensor]] = {}
    for _, recorded in passes if torch.is_grad_enabled() else ():
        for block, (tokens,) in recorded.outputs.items():
            found.setdefault(block, []).append(tokens)
    return found


def _without_zeros(
    tapped: Mapping[int, Mapping[int, Tensor]], references: Sequence[Tensor], grid: Grid
) -> dict[int, list[Tensor]]:
    """By block the samples in order, without the tokens of zeros: they show no subject."""
    lengths = [(grid[0] + len(r)) * grid[1] * grid[2] for r in references]
    return {
        block: [rows[i][:length] for i, length in enumerate(lengths)]
        for block, rows in tapped.items()
    }


def _communicates(transformer: WanTransformer3DModel) -> bool:
    """Whether a forward call waits for other ranks."""
    return any(isinstance(module, FSDPModule) for module in transformer.modules())


def _groups(num_frames: Sequence[int], *, alone: bool) -> list[list[int]]:
    """Sample indices that run together: those with equally many extra frames.

    Under FSDP2, every sample runs `alone`. It communicates in each forward call, so all ranks must
    make equally many, whatever references they happened to draw.
    """
    if alone:
        return [[i] for i in range(len(num_frames))]
    return [
        [i for i, k in enumerate(num_frames) if k == count] for count in sorted(set(num_frames))
    ]
