"""Encoded clips that several runs of a process share."""

from collections.abc import Callable

from alignlab.config.run import RunConfig
from alignlab.training.setup import Caches, shared_caches


def test_only_runs_that_encode_alike_share_their_clips(
    make_config: Callable[..., RunConfig],
) -> None:
    known: dict[str, Caches] = {}
    first = shared_caches(make_config(), known)
    for equal in ("seed=3", "optim.lr=1", "steps=9", "model.text_to_references=true", "name=b"):
        assert shared_caches(make_config(equal), known) is first, equal
    found = {id(first)}
    for other in ("model.precision=bf16", "data.frames=9", "data.train_clips=5"):
        found.add(id(shared_caches(make_config(other), known)))
    assert len(found) == len(known) == 4
