"""Taps: the output of chosen transformer blocks, and queries and keys of their self-attention,
caught by hooks that change nothing.

Shape letters: B batch, N video tokens, M reference tokens, D width, P tokens per frame, K
references, H heads, E channels of a head.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alignlab.config.run import check_block
from alignlab.errors import UserError
from alignlab.kernels.host_copy import to_device
from alignlab.losses.objective import Grid, Tokens
from alignlab.models.attention import rotate

WanTransformer: TypeAlias = WanTransformer3DModel | WanVACETransformer3DModel
"""Transformers whose blocks can be tapped."""

Kind = Literal["video", "reference", "attention"]
"""Output of a block, for the tokens of the video or of the references; or queries and keys of its
self-attention, for those of the video."""
KINDS: tuple[Kind, ...] = ("video", "reference")
"""What is kept of a block unless it is said."""


@dataclass(frozen=True)
class BlockTokens:
    """What was tapped of one block for a batch; None where tokens of a kind were not to be kept.

    Args:
        kept_video: the noisy video's tokens.
        kept_reference: the reference images' tokens, padded to the batch's largest number of them.
        kept_attention: the noisy video's queries and keys (`Tokens.heads`).
    """

    kept_video: Tokens | None
    kept_reference: Tokens | None
    kept_attention: Tokens | None = None

    @property
    def video(self) -> Tokens:
        """The noisy video's tokens, which were kept."""
        return self.of("video")

    @property
    def reference(self) -> Tokens:
        """The reference images' tokens, which were kept."""
        return self.of("reference")

    def of(self, kind: Kind) -> Tokens:
        """The tokens of a kind.

        Raises:
            ValueError: they were not to be kept.
        """
        kept = {
            "video": self.kept_video,
            "reference": self.kept_reference,
            "attention": self.kept_attention,
        }[kind]
        if kept is None:
            raise ValueError(f"the {kind} tokens of this block were not to be kept")
        return kept


@dataclass
class Recorded:
    """What the forward passes inside a `recording` gave, in order, by block.

    Args:
        outputs: of each block, (B, N + M, D).
        attention: queries and keys of its self-attention as this gets them, positions included,
            (B, N + M, 2, H, E); there at the end of the `recording`.
    """

    outputs: dict[int, list[Tensor]]
    attention: dict[int, list[Tensor]]


@dataclass
class _Attention:
    """What hooks catch of a block's self-attention, which a block that runs again leaves alone.

    Nothing is computed of it within the block: gradient checkpointing expects that the block does
    the same when it runs again.
    """

    heads: int
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    positions: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def placed(self, block: int, passes: int) -> list[Tensor]:
        """Of each forward pass queries and keys with their positions, (B, N + M, 2, H, E)."""
        if {passes} != {len(self.queries), len(self.keys), len(self.positions)}:
            raise UserError(
                f"transformer: queries and keys of blocks.{block}.attn1 were not seen: its "
                "processor must call norm_q and norm_k, as WanAttnProcessor does, and blocks that "
                "are compiled one by one need torch._dynamo.config.skip_nnmodule_hook_guards = "
                "False before their first call"
            )
        return [
            torch.stack([rotate(x.unflatten(2, (self.heads, -1)), *tables) for x in pair], 2)
            for *pair, tables in zip(self.queries, self.keys, self.positions, strict=True)
        ]


class Taps:
    """Forward hooks on `transformer.blocks[i]`, present between enter and exit.

    They catch only inside `recording`, so a block that gradient checkpointing runs again in the
    backward pass leaves no trace. Enter before the first call of a compiled model: torch.compile
    traces hooks once and does not see later changes. Each tapped block is one more variant to
    compile: with 8 or more, `compile_repeated_blocks(fullgraph=True)` needs a higher
    `torch._dynamo.config.recompile_limit`. Blocks that are compiled one by one share what was
    compiled of the first, and whether modules inside have hooks is looked at with
    `torch._dynamo.config.skip_nnmodule_hook_guards = False` alone, which `attention` needs there.

    Args:
        transformer: the model itself (`find_wan`), without DDP or compile wrappers.
        blocks: 0-based block indices.
        attention: those of them of whose self-attention queries and keys are caught as well.

    Raises:
        UserError: an index is out of range.
    """

    def __init__(
        self, transformer: WanTransformer, blocks: Sequence[int], attention: Sequence[int] = ()
    ) -> None:
        for block in blocks:
            check_block("blocks", block, len(transformer.blocks))
        self._modules = {block: transformer.blocks[block] for block in sorted(set(blocks))}
        self._attention_blocks = sorted(set(attention))
        self._handles: list[RemovableHandle] = []
        self._record: dict[int, list[Tensor]] | None = None
        self._attention: dict[int, _Attention] = {}

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    def __enter__(self) -> Self:
        for block, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(block)))
        for block in self._attention_blocks:
            self._handles += self._attention_hooks(block, self._modules[block].attn1)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def recording(self) -> Iterator[Recorded]:
        """Gives what the forward passes inside fill.

        Raises:
            UserError: queries and keys are to be caught, and the transformer's attention did not
                show them.
        """
        self._record = {block: [] for block in self._modules}
        attention = {b: _Attention(self._modules[b].attn1.heads) for b in self._attention_blocks}
        self._attention = attention
        recorded = Recorded(self._record, {})
        try:
            yield recorded
        finally:
            self._record, self._attention = None, {}
        recorded.attention = {
            block: caught.placed(block, len(recorded.outputs[block]))
            for block, caught in attention.items()
        }

    def _hook(self, block: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def catch(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._record is not None:
                self._record[block].append(output)

        return catch

    def _attention_hooks(self, block: int, attention: Any) -> list[RemovableHandle]:
        def positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self._record is not None:
                given = kwargs["rotary_emb"] if "rotary_emb" in kwargs else args[3]
                self._attention[block].positions.append(given)

        def query(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._record is not None:
                self._attention[block].queries.append(output)

        def key(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._record is not None:
                self._attention[block].keys.append(output)

        return [
            attention.register_forward_pre_hook(positions, with_kwargs=True),
            attention.norm_q.register_forward_hook(query),
            attention.norm_k.register_forward_hook(key),
        ]


def find_wan(transformer: nn.Module) -> WanTransformer:
    """The diffusers Wan transformer itself, inside whatever DDP, FSDP, torch.compile, PEFT or
    accelerate have wrapped around it.

    Raises:
        UserError: there is none, or there are several, or its patches span several latent frames.
    """
    given = type(transformer).__name__
    if not isinstance(transformer, nn.Module):
        raise UserError(f"transformer: {given} is no torch module; give it pipeline.transformer")
    found = [module for module in transformer.modules() if isinstance(module, WanTransformer)]
    if len(found) != 1:
        names = " or ".join(row.__name__ for row in get_args(WanTransformer))
        raise UserError(f"transformer: {given} holds {len(found)} models of {names}; give it one")
    patch = tuple(found[0].config["patch_size"])
    if patch[0] != 1:
        raise UserError(f"transformer: its patches {patch} span several latent frames")
    model: WanTransformer = found[0]
    return model


def block_tokens(
    tapped: Mapping[int, Sequence[Tensor]],
    grid: Grid,
    kinds: Mapping[int, Collection[Kind]] | None = None,
    attention: Mapping[int, Sequence[Tensor]] | None = None,
) -> dict[int, BlockTokens]:
    """Puts the samples of a batch together, however many references each has.

    Args:
        tapped: by block and sample (N + K*P, D), video tokens first; K may differ among samples.
        grid: the video's (T, H, W); a reference fills (1, H, W).
        kinds: by block, which tokens are kept: they are copies. None: all of both kinds.
        attention: likewise (N + K*P, 2, H, E), of blocks whose queries and keys were tapped.
    """
    frames, height, width = grid
    num_video, per_image = frames * height * width, height * width
    found: dict[int, BlockTokens] = {}
    ids: tuple[Tensor, Tensor] | None = None  # the same for every block
    for block, samples in tapped.items():
        kept = KINDS if kinds is None else kinds[block]
        video = reference = placed = None
        if "video" in kept:
            video = Tokens(torch.stack([t[:num_video] for t in samples]), grid)
        if "reference" in kept:
            counts = [(len(t) - num_video) // per_image for t in samples]
            if ids is None:
                host_ids_BM = _slots(counts, per_image)
                ids = to_device(host_ids_BM, samples[0].device), host_ids_BM
            longest = max(counts)
            rows = [
                F.pad(t[num_video:], (0, 0, 0, (longest - count) * per_image))
                for t, count in zip(samples, counts, strict=True)
            ]
            reference = Tokens(torch.stack(rows), (longest, height, width), *ids)
        if "attention" in kept and attention is not None:
            rows = [t[:num_video] for t in attention[block]]
            placed = Tokens(torch.stack(rows).flatten(2), grid, heads=rows[0].shape[2])
        found[block] = BlockTokens(video, reference, placed)
    return found


def _slots(counts: Sequence[int], per_image: int) -> Tensor:
    """Which of a sample's references a token is of, -1 for padding, (B, M) on the CPU."""
    slots_K = torch.arange(max(counts))
    slots_BK = slots_K.where(slots_K < torch.tensor(counts)[:, None], -1)
    return slots_BK.repeat_interleave(per_image, dim=1)
