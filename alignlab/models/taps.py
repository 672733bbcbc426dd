"""Taps: the output of chosen transformer blocks, caught by hooks that change nothing.

Shape letters: B batch, N video tokens, M reference tokens, D width, P tokens per frame.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alignlab.config.run import check_block
from alignlab.losses.objective import Grid, Tokens


@dataclass(frozen=True)
class BlockTokens:
    """Output of one block for a batch.

    Args:
        video: the noisy video's tokens.
        reference: the reference images' tokens, padded to the batch's largest number of them.
    """

    video: Tokens
    reference: Tokens


class Taps:
    """Forward hooks on `transformer.blocks[i]`, present between enter and exit.

    They catch only inside `recording`, so a block that gradient checkpointing runs again in the
    backward pass leaves no trace. Enter before the first call of a compiled model: torch.compile
    traces hooks once and does not see later changes. Each tapped block is one more variant to
    compile: with 8 or more, `compile_repeated_blocks(fullgraph=True)` needs a higher
    `torch._dynamo.config.recompile_limit`.

    Args:
        transformer: the model itself, without DDP or compile wrappers.
        blocks: 0-based block indices.

    Raises:
        UserError: an index is out of range.
    """

    def __init__(self, transformer: WanTransformer3DModel, blocks: Sequence[int]) -> None:
        for block in blocks:
            check_block("blocks", block, len(transformer.blocks))
        self._modules = {block: transformer.blocks[block] for block in sorted(set(blocks))}
        self._handles: list[RemovableHandle] = []
        self._record: dict[int, Tensor] | None = None

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
    def recording(self) -> Iterator[dict[int, Tensor]]:
        """Gives a dict that the forward passes inside fill: block index -> (B, N + M, D)."""
        self._record = {}
        try:
            yield self._record
        finally:
            self._record = None

    def _hook(self, block: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def catch(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._record is not None:
                self._record[block] = output

        return catch


def block_tokens(samples: Sequence[Tensor], grid: Grid) -> BlockTokens:
    """Puts the samples of a batch together, however many references each has.

    Args:
        samples: per sample (N + K*P, D), video tokens first; K may differ.
        grid: the video's (T, H, W); a reference fills (1, H, W).
    """
    frames, height, width = grid
    per_image = height * width
    num_video = frames * per_image
    longest = max(len(tokens) for tokens in samples) - num_video
    slots = torch.arange(longest, device=samples[0].device)
    reference_BMD = torch.stack(
        [F.pad(t[num_video:], (0, 0, 0, longest + num_video - len(t))) for t in samples]
    )
    ids_BM = torch.stack(
        [
            slots.div(per_image, rounding_mode="floor").where(slots < len(t) - num_video, -1)
            for t in samples
        ]
    )
    return BlockTokens(
        video=Tokens(torch.stack([t[:num_video] for t in samples]), grid),
        reference=Tokens(reference_BMD, (longest // per_image, height, width), ids_BM),
    )
