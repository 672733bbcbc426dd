"""Queries and keys of an image teacher's layers, of which objectives make its attention maps.

Shape letters: N images, L tokens of one, P patches, D width of all heads, E channels of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.errors import UserError

PROJECTIONS = ("q_proj", "k_proj")


@dataclass
class LayerAttention:
    """What hooks catch of one layer in a forward pass.

    Args:
        projected: its queries and its keys, (N, L, D) each, before rotary positions.
        rotary: cosines and sines of the patches' positions, (P, E) each; None: it has none.
    """

    projected: dict[str, Tensor] = field(default_factory=dict)
    rotary: tuple[Tensor, Tensor] | None = None

    def tokens(self, heads: int) -> Tensor:
        """Queries and then keys as the attention gets them, (N, L, 2 D), fp32."""
        return torch.cat([self._placed(self.projected[name], heads) for name in PROJECTIONS], -1)

    def _placed(self, tokens_NLD: Tensor, heads: int) -> Tensor:
        """With rotary positions, which turn channel i of a head with channel i + E / 2.

        They are the patches': tokens before those have none.
        """
        tokens_NLD = tokens_NLD.float()
        if self.rotary is None:
            return tokens_NLD
        cos, sin = (table.float()[:, None] for table in self.rotary)
        prefix = tokens_NLD.shape[1] - len(cos)
        patches = tokens_NLD[:, prefix:].unflatten(-1, (heads, -1))
        low, high = patches.chunk(2, -1)
        turned = patches * cos + torch.cat([-high, low], -1) * sin
        return torch.cat([tokens_NLD[:, :prefix], turned.flatten(2)], 1)


@contextmanager
def recorded_attention(model: nn.Module, layers: Sequence[int]) -> Iterator[list[LayerAttention]]:
    """Gives what a forward pass inside fills, of each layer; it changes nothing of the pass.

    Args:
        model: of a transformers class whose attention modules have `q_proj` and `k_proj`.
        layers: counted from 0.

    Raises:
        UserError: its attention is of other modules.
    """
    modules = attention_modules(model) if layers else []
    if layers and len(modules) <= max(layers):
        raise UserError(
            f"teachers feature: queries and keys of {type(model).__name__} cannot be read in this "
            f"version of transformers, which has no {' and '.join(PROJECTIONS)} in its attention: "
            "install a later one, or take another family"
        )
    found = [LayerAttention() for _ in layers]
    with ExitStack() as hooks:
        for layer, caught in zip(layers, found, strict=True):
            for handle in _hooks(modules[layer], caught):
                hooks.callback(handle.remove)
        yield found


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Self-attention of each layer of a vision transformer, in order."""
    return [m for m in model.modules() if all(hasattr(m, name) for name in PROJECTIONS)]


def _hooks(module: nn.Module, caught: LayerAttention) -> Iterator[Any]:
    def keep_positions(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught.rotary = kwargs.get("position_embeddings")

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            caught.projected[name] = output

        return hook

    yield module.register_forward_pre_hook(keep_positions, with_kwargs=True)
    for name in PROJECTIONS:
        yield getattr(module, name).register_forward_hook(keep(name))
