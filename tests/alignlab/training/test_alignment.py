"""What objectives are given: subjects of references, checked and finite features of teachers."""

import pytest
import torch

from alignlab.losses.objective import Features, Tokens
from alignlab.models.taps import BlockTokens
from alignlab.training.alignment import feature_magnitudes, noise_clips, shared_subjects


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


def test_one_clip_of_noise_is_dark_and_one_is_bright() -> None:
    clips_BTHWC = noise_clips(3, (4, 6))
    assert clips_BTHWC.shape == (2, 3, 4, 6, 3) and clips_BTHWC.dtype == torch.uint8
    dark, bright = clips_BTHWC
    assert dark.max() < 128 <= bright.min() and len(bright.unique()) > 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_magnitude_of_features_is_their_mean(dtype: torch.dtype) -> None:
    tokens_BTPD = torch.randn(3, 5, 64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens_BTPD[1, 0, 0, 0], tokens_BTPD[2, 4, 63, 31] = torch.nan, -torch.inf
    empty = Features(tokens_BTPD[:, :0], (0, 8, 8))
    found = feature_magnitudes(
        {("dino", "video"): Features(tokens_BTPD, (5, 8, 8)), ("dino", "reference"): empty}
    )
    expected_B = tokens_BTPD.float().abs().flatten(1).mean(1)
    torch.testing.assert_close(found["features/dino/video"], expected_B, equal_nan=True)
    assert found["features/dino/reference"].tolist() == [0, 0, 0]
