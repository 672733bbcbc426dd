"""What objectives are given: subjects of references, checked and finite features of teachers."""

import pytest
import torch

from alignlab.losses.objective import Features
from alignlab.training.batch_context import shared_subjects
from alignlab.training.step_terms import feature_magnitudes
from alignlab.training.teacher_check import noise_clips


def test_equal_names_share_an_id() -> None:
    ids_BN = shared_subjects([["cat", "dog", "cat"], ["cat", "dog"]], (3, 1, 2))
    assert ids_BN.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, -1, -1]]


def test_ids_tell_subjects_apart_across_samples() -> None:
    ids_BN = shared_subjects([["cat", "dog"], [], ["owl", "cat"]], (2, 1, 1))
    assert ids_BN.tolist() == [[0, 1], [-1, -1], [2, 0]]


def test_a_batch_without_references_has_no_ids() -> None:
    assert shared_subjects([[], []], (0, 3, 3)).shape == (2, 0)


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
