"""What pull and push are, in values: shared by the signature and its implementations."""

from typing import NamedTuple

from torch import Tensor


class PullPush(NamedTuple):
    """The two terms, one value per leading index, both >= 0."""

    pull: Tensor
    push: Tensor
