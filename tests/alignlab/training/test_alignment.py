"""References that show the same subject are one subject to an objective."""

import torch

from alignlab.losses.objective import Tokens
from alignlab.models.taps import BlockTokens
from alignlab.training.alignment import shared_subjects


def tokens(ids: list[list[int]]) -> BlockTokens:
    ids_BN = torch.tensor(ids)
    batch, count = ids_BN.shape
    reference = Tokens(torch.zeros(batch, count, 2), (count, 1, 1), ids_BN)
    return BlockTokens(Tokens(torch.zeros(batch, 1, 2), (1, 1, 1)), reference)


def test_equal_names_share_an_id() -> None:
    found = shared_subjects(
        tokens([[0, 1, 2], [0, 1, -1]]), [["cat", "dog", "cat"], ["cat", "dog"]]
    )
    assert found.subject_ids_BN is not None
    assert found.subject_ids_BN.tolist() == [[0, 1, 0], [0, 1, -1]]


def test_ids_tell_subjects_apart_across_samples() -> None:
    found = shared_subjects(
        tokens([[0, 1], [-1, -1], [0, 1]]), [["cat", "dog"], [], ["owl", "cat"]]
    )
    assert found.subject_ids_BN is not None
    assert found.subject_ids_BN.tolist() == [[0, 1], [-1, -1], [2, 0]]
