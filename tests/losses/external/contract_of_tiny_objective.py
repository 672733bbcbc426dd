"""The package's own test: alignlab's contract, run on its objectives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_gram import Gram, gram_loss  # type: ignore[import-not-found]
from tiny_latents import (  # type: ignore[import-not-found]
    LatentError,
    Spread,
    latent_error,
    spread_loss,
)
from tiny_objective import (  # type: ignore[import-not-found]
    ChannelGain,
    ChannelGainConfig,
    UnitDistance,
    unit_distance,
)
from torch import Tensor

from alignlab.losses.stage1.folder import Stage1Info, Stage1Teacher, save_stage1
from alignlab.losses.testing.contract import CHECKS, Check, ContractCase
from alignlab.losses.testing.samples import TEACHER_DIMS


def naive(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(student_BND, teacher_BND, dim=-1)
    return (2 - 2 * cosine).mean(-1)


def with_gain(case: ContractCase, folder: Path) -> ContractCase:
    """Writes a Stage 1 folder, as a training would."""
    path, width = folder / "gain", TEACHER_DIMS["dino"]
    path.mkdir()
    config = ChannelGainConfig(teacher_dim=width)
    info = Stage1Info(
        kind="unit_distance",
        teacher=Stage1Teacher(family="dinov2", path="x", feature="post_norm"),
        teacher_dim=width,
        grid=(2, 2),
        module=config,
    )
    save_stage1(path, ChannelGain(config, seed=1), info)
    return replace(case, changes={**case.changes, "gain": str(path)})


CASE = ContractCase(
    objective=UnitDistance,
    settings={"teacher": "dino", "blocks": (0, 1)},
    changes={"blocks": (1,), "teacher": "clip", "scale": 2.0},
    formula=lambda s, t, ids: unit_distance(s, t),
    naive=naive,
    prepare=with_gain,
)


def naive_gram(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    ours, theirs = (x / x.norm(dim=-1, keepdim=True) for x in (student_BND, teacher_BND))
    distance_B: Tensor = (ours @ ours.mT - theirs @ theirs.mT).pow(2).mean((1, 2))
    return distance_B


WITHOUT_PROJECTOR = ContractCase(
    objective=Gram,
    settings={"teacher": "dino", "blocks": (0, 1)},
    changes={"blocks": (1,), "teacher": "clip"},
    formula=lambda s, t, ids: gram_loss(s, t),
    naive=naive_gram,
)


def naive_error(student_BND: Tensor, latents_BND: Tensor, ids_BN: Tensor) -> Tensor:
    return (student_BND - latents_BND).pow(2).mean((1, 2))


def naive_spread(student_BND: Tensor, latents_BND: Tensor, ids_BN: Tensor) -> Tensor:
    unit_BND = student_BND / student_BND.norm(dim=-1, keepdim=True)
    spread_B: Tensor = (unit_BND @ unit_BND.mT).mean((1, 2))
    return spread_B


OF_LATENTS = ContractCase(
    objective=LatentError,
    settings={"blocks": (0, 1)},
    changes={"blocks": (1,)},
    formula=lambda s, t, ids: latent_error(s, t),
    naive=naive_error,
)
OF_NOTHING = ContractCase(
    objective=Spread,
    settings={"blocks": (0, 1)},
    changes={"blocks": (1,), "far": 1},
    formula=lambda s, t, ids: spread_loss(s),
    naive=naive_spread,
)
CASES = [CASE, WITHOUT_PROJECTOR, OF_LATENTS, OF_NOTHING]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check, case: ContractCase, tmp_path: Path) -> None:
    check(case.ready(tmp_path))
