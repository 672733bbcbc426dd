"""The package's own test: alignlab's contract, run on its objective."""

from pathlib import Path

import pytest
import torch
from tiny_objective import UnitDistance, unit_distance  # type: ignore[import-not-found]
from torch import Tensor

from alignlab.losses.testing.contract import CHECKS, Check, ContractCase


def naive(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(student_BND, teacher_BND, dim=-1)
    return (2 - 2 * cosine).mean(-1)


CASE = ContractCase(
    objective=UnitDistance,
    settings={"teacher": "dino", "blocks": (0, 1)},
    changes={"blocks": (1,), "teacher": "clip", "scale": 2.0},
    formula=lambda s, t, ids: unit_distance(s, t),
    naive=naive,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check, tmp_path: Path) -> None:
    check(CASE.ready(tmp_path))
