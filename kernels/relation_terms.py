"""What the relation distance measures: its three means and the weight of a pair of tokens.

Shape letters: B batch, T frames, P tokens per frame.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Routing = Literal["or", "and", "xor", "uniform"]

DENOMINATOR_EPS = 1e-6


class Relation(NamedTuple):
    """The three weighted means, (B,) each, all >= 0."""

    spatial: Tensor
    temporal: Tensor
    joint: Tensor


def pair_weight(first: Tensor, second: Tensor, routing: Routing) -> Tensor:
    """Computes how much a pair of tokens counts from the saliencies of the two (SARA).

    "or": a + b - ab; "and": ab; "xor": |a - b|; "uniform": 1.
    """
    match routing:
        case "or":
            return first + second - first * second
        case "and":
            return first * second
        case "xor":
            return (first - second).abs()
        case "uniform":
            return torch.ones_like(first * second)


def plain_means(relation: Relation, frames: int, tokens: int, tau: float = math.inf) -> Relation:
    """Turns weighted means of uniform routing into plain ones: sums divided by counts of pairs.

    Only the decay and the 1e-6 are weights there, so this is a constant factor each: VideoREPA and
    MoAlign divide by the number of pairs, SARA by the sum of weights. A mean over no pairs stays 0.

    Args:
        relation: what `relation_distance` gave for `routing="uniform"` and this `tau`.
        frames: T.
        tokens: P.
        tau: the decay that `relation` was computed with.
    """
    pairs = tokens * tokens
    spatial, temporal = frames * pairs, frames * (frames - 1) * pairs
    decayed = pairs * sum(
        2 * (frames - apart) * math.exp(-apart / tau) for apart in range(1, frames)
    )
    return Relation(
        relation.spatial * ((spatial + DENOMINATOR_EPS) / max(spatial, 1)),
        relation.temporal * ((decayed + DENOMINATOR_EPS) / max(temporal, 1)),
        relation.joint * ((spatial + temporal + DENOMINATOR_EPS) / max(spatial + temporal, 1)),
    )


def mean_relation(relations: Sequence[Relation]) -> Relation:
    """Averages each of the three means over several relations, such as those of several blocks."""
    return Relation(*(torch.stack(terms).mean(0) for terms in zip(*relations, strict=True)))
