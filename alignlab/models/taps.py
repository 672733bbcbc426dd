"""Taps: the output of chosen transformer blocks, caught by hooks that change nothing.

Shape letters: B batch, N video tokens, M reference tokens, D width, P tokens per frame, K
references.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

WanTransformer: TypeAlias = WanTransformer3DModel | WanVACETransformer3DModel
"""Transformers whose blocks can be tapped."""

Kind = Literal["video", "reference"]
KINDS: tuple[Kind, ...] = ("video", "reference")


@dataclass(frozen=True)
class BlockTokens:
    """Output of one block for a batch; None where tokens of a kind were not to be kept.

    Args:
        kept_video: the noisy video's tokens.
        kept_reference: the reference images' tokens, padded to the batch's largest number of them.
    """

    kept_video: Tokens | None
    kept_reference: Tokens | None

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
        kept = self.kept_video if kind == "video" else self.kept_reference
        if kept is None:
            raise ValueError(f"the {kind} tokens of this block were not to be kept")
        return kept


class Taps:
    """Forward hooks on `transformer.blocks[i]`, present between enter and exit.

    They catch only inside `recording`, so a block that gradient checkpointing runs again in the
    backward pass leaves no trace. Enter before the first call of a compiled model: torch.compile
    traces hooks once and does not see later changes. Each tapped block is one more variant to
    compile: with 8 or more, `compile_repeated_blocks(fullgraph=True)` needs a higher
    `torch._dynamo.config.recompile_limit`.

    Args:
        transformer: the model itself (`find_wan`), without DDP or compile wrappers.
        blocks: 0-based block indices.

    Raises:
        UserError: an index is out of range.
    """

    def __init__(self, transformer: WanTransformer, blocks: Sequence[int]) -> None:
        for block in blocks:
            check_block("blocks", block, len(transformer.blocks))
        self._modules = {block: transformer.blocks[block] for block in sorted(set(blocks))}
        self._handles: list[RemovableHandle] = []
        self._record: dict[int, list[Tensor]] | None = None

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    def __enter__(self) -> Self:
        for block, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(block)))
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
    def recording(self) -> Iterator[dict[int, list[Tensor]]]:
        """Gives what the forward passes inside fill, by block: (B, N + M, D) of each, in order."""
        self._record = {block: [] for block in self._modules}
        try:
            yield self._record
        finally:
            self._record = None

    def _hook(self, block: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def catch(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._record is not None:
                self._record[block].append(output)

        return catch


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
) -> dict[int, BlockTokens]:
    """Puts the samples of a batch together, however many references each has.

    Args:
        tapped: by block and sample (N + K*P, D), video tokens first; K may differ among samples.
        grid: the video's (T, H, W); a reference fills (1, H, W).
        kinds: by block, which tokens are kept: they are copies. None: all of both kinds.
    """
    frames, height, width = grid
    num_video, per_image = frames * height * width, height * width
    found: dict[int, BlockTokens] = {}
    ids: tuple[Tensor, Tensor] | None = None  # the same for every block
    for block, samples in tapped.items():
        kept = KINDS if kinds is None else kinds[block]
        video = reference = None
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
        found[block] = BlockTokens(video, reference)
    return found


def _slots(counts: Sequence[int], per_image: int) -> Tensor:
    """Which of a sample's references a token is of, -1 for padding, (B, M) on the CPU."""
    slots_K = torch.arange(max(counts))
    slots_BK = slots_K.where(slots_K < torch.tensor(counts)[:, None], -1)
    return slots_BK.repeat_interleave(per_image, dim=1)
