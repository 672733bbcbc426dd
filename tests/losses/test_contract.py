"""What every objective owes the harness. A new objective adds one row to ROWS."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import alignlab.losses
from alignlab.losses import build_objective
from alignlab.losses.align4gen import Align4Gen, fused_alignment_loss
from alignlab.losses.crepa import Crepa, cross_frame_loss
from alignlab.losses.dispersive import Dispersive, dispersive_loss
from alignlab.losses.haste_attention import HasteAttention, attention_alignment_loss
from alignlab.losses.irepa import IRepa, irepa_loss
from alignlab.losses.layersync import LayerSync, layersync_loss
from alignlab.losses.local_gram_flow import LocalGramFlow, local_gram_flow_loss
from alignlab.losses.m2_repa import M2Repa, decoupled_alignment_loss
from alignlab.losses.moalign import MoAlign, motion_relation_loss
from alignlab.losses.objective import Features, ObjectiveConfig, Tokens
from alignlab.losses.refalign import RefAlign, reference_alignment_loss
from alignlab.losses.registry import BUILT_IN
from alignlab.losses.repa import Repa, repa_loss
from alignlab.losses.sara import Sara, routed_relation_loss
from alignlab.losses.self_flow import SelfFlow
from alignlab.losses.sra import Sra, self_alignment_loss
from alignlab.losses.stage1.folder import Stage1Info, Stage1Teacher, save_stage1
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig
from alignlab.losses.stage1.saliency_aligner import SaliencyAligner, SaliencyAlignerConfig
from alignlab.losses.testing.contract import CHECKS, Check, ContractCase
from alignlab.losses.testing.samples import TEACHER_DIMS, TEXT_DIM
from alignlab.losses.vae_repa import VaeRepa, vae_alignment_loss
from alignlab.losses.videorepa import VideoRepa, token_relation_loss

FRAMES, WIDTHS = 3, [60, 40]


def frames(tokens_BND: Tensor) -> Tensor:
    split: Tensor = tokens_BND.unflatten(1, (FRAMES, -1))
    return split


def naive_refalign(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    sim_BNN = F.normalize(student_BND, dim=-1) @ F.normalize(teacher_BND, dim=-1).mT
    cross_BNN = ids_BN[:, :, None] != ids_BN[:, None, :]
    pull_B = (1 - sim_BNN.diagonal(dim1=1, dim2=2)).mean(1)
    return pull_B + (sim_BNN.relu() * cross_BNN).sum((1, 2)) / cross_BNN.sum((1, 2))


def naive_repa(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    return -(F.normalize(student_BND, dim=-1) * F.normalize(teacher_BND, dim=-1)).sum(-1).mean(1)


def naive_irepa(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    teacher = frames(teacher_BND)
    target = (teacher - 0.6 * teacher.mean(2, keepdim=True)) / teacher.std(2, keepdim=True)
    return naive_repa(student_BND, target.flatten(1, 2), ids_BN)


def naive_align4gen(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    joined = torch.cat([F.normalize(x, dim=-1) for x in teacher_BND.split(WIDTHS, -1)], -1)
    return naive_repa(student_BND, joined, ids_BN)


def naive_m2_repa(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    heads, teachers = (x.split(WIDTHS, -1) for x in (student_BND, teacher_BND))
    aligned = [
        naive_repa(head, teacher, ids_BN) for head, teacher in zip(heads, teachers, strict=True)
    ]
    left, right = (x @ x.mT for x in (head - head.mean(1, keepdim=True) for head in heads))
    norms = [(x * y).sum((1, 2)) for x, y in ((left, right), (left, left), (right, right))]
    cka_B: Tensor = norms[0] / (norms[1] * norms[2]).sqrt()
    return (aligned[0] + aligned[1]) / 2 + 0.05 * cka_B


def naive_crepa(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    student, teacher = (F.normalize(frames(x), dim=-1) for x in (student_BND, teacher_BND))
    sim_BTT = torch.einsum("btpd,bupd->btu", student, teacher) / student.shape[2]
    apart = torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)
    return -(sim_BTT * torch.exp(-apart.abs()) * (apart.abs() <= 1)).sum((1, 2))


def relations(student_BND: Tensor, teacher_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of two similarity matrices, (B, N, N), and which frames pairs are apart, (N, N)."""
    student, teacher = (F.normalize(x, dim=-1) for x in (student_BND, teacher_BND))
    frame_N = torch.arange(FRAMES).repeat_interleave(student.shape[1] // FRAMES)
    apart_NN = (frame_N[:, None] - frame_N).abs()
    return (student @ student.mT - teacher @ teacher.mT).abs(), apart_NN


def naive_videorepa(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    return (relations(student_BND, teacher_BND)[0] - 0.1).relu().mean((1, 2))


def naive_sara(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    distance_BNN, apart_NN = relations(student_BND, teacher_BND)
    w_N = saliency(student_BND)[0].flatten().to(student_BND.dtype)
    weight_NN = w_N[:, None] + w_N - w_N[:, None] * w_N
    means = []
    for pairs_NN in (apart_NN == 0, apart_NN > 0):
        weights_NN = weight_NN * pairs_NN
        means.append((distance_BNN * weights_NN).sum((1, 2)) / (weights_NN.sum() + 1e-6))
    return means[0] + means[1]


def naive_moalign(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    distance_BNN, apart_NN = relations(student_BND, teacher_BND)
    spatial_B = (distance_BNN * (apart_NN == 0)).sum((1, 2)) / (apart_NN == 0).sum()
    decayed_BNN = distance_BNN * torch.exp(-apart_NN / 10.0) * (apart_NN > 0)
    return spatial_B + decayed_BNN.sum((1, 2)) / (apart_NN > 0).sum()


def naive_dispersive(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    z_BF = student_BND.flatten(1)
    distance_BB = (z_BF[:, None] - z_BF).square().sum(-1) / z_BF.shape[1]
    others = distance_BB[~torch.eye(len(z_BF), dtype=torch.bool)]
    return torch.exp(-others / 0.5).mean().log().expand(len(z_BF))


def squares(tokens_BND: Tensor) -> Tensor:
    """Frames of 3x7 tokens."""
    split: Tensor = frames(tokens_BND).unflatten(2, (3, 7))
    return split


def naive_local_gram_flow(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    rows, columns = torch.arange(3).repeat_interleave(7), torch.arange(7).repeat(3)
    near_PP = (columns[:, None] - columns).abs() <= 3  # and all three rows
    assert ((rows[:, None] - rows).abs() <= 3).all()
    shares = [
        ((x[:, :-1] @ x[:, 1:].mT) / 0.1).masked_fill(~near_PP, -torch.inf).log_softmax(-1)
        for x in (frames(student_BND), frames(teacher_BND))
    ]
    gap = torch.where(near_PP, shares[1] - shares[0], 0.0)
    return (shares[1].exp() * gap).sum(-1).mean((1, 2))


def attention_maps(tokens_BND: Tensor) -> Tensor:
    """Logits of five heads."""
    query, key = frames(tokens_BND).unflatten(-1, (2, 5, 10)).transpose(2, 4).unbind(3)
    logits: Tensor = query @ key.mT / 10**0.5
    return logits


def naive_haste_attention(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    student, teacher = (attention_maps(x).softmax(-1) for x in (student_BND, teacher_BND))
    return -(teacher * student.log()).sum(-1).mean((1, 2, 3))


def saliency(tokens_BND: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    tokens = tokens_BND.shape[1] // FRAMES
    return torch.rand(FRAMES, tokens, generator=rng).expand(len(tokens_BND), FRAMES, tokens)


def with_aligners(case: ContractCase, folder: Path) -> ContractCase:
    for name, alias, seed in (("first", "dino", 0), ("second", "dino", 1), ("wide", "clip", 0)):
        config = SaliencyAlignerConfig(
            teacher_dim=TEACHER_DIMS[alias], text_dim=TEXT_DIM, heads=1, hidden=8, embed_dim=8
        )
        write_stage1(folder / name, SaliencyAligner(config, seed=seed))
    return with_folders(case, folder, "aligner")


def with_heads(case: ContractCase, folder: Path) -> ContractCase:
    for name, alias, seed in (("first", "dino", 0), ("second", "dino", 1), ("wide", "clip", 0)):
        config = MotionHeadConfig(teacher_dim=TEACHER_DIMS[alias], width=6, hidden=8, decoder=4)
        write_stage1(folder / name, MotionHead(config, seed=seed))
    return with_folders(case, folder, "head")


def write_stage1(folder: Path, module: SaliencyAligner | MotionHead) -> None:
    folder.mkdir()
    info = Stage1Info(
        kind="sara" if isinstance(module, SaliencyAligner) else "moalign",
        teacher=Stage1Teacher(family="dinov2", path="x", feature="post_norm"),
        teacher_dim=module.config.teacher_dim,
        grid=(2, 2),
        module=module.config,
    )
    save_stage1(folder, module, info)


def with_folders(case: ContractCase, folder: Path, setting: str) -> ContractCase:
    return replace(
        case,
        settings={**case.settings, setting: str(folder / "first")},
        changes={**case.changes, setting: str(folder / "second")},
        alongside={**case.alongside, "teacher": {setting: str(folder / "wide")}},
    )


TOKEN_COSINE = {"centered": True, "temporal_difference": True}

ROWS = [
    ContractCase(
        objective=RefAlign,
        settings={"teacher": "dino", "blocks": (0, 1)},
        changes={
            "blocks": (0,),
            "teacher": "clip",
            "neg_weight": 0.5,
            "pos_margin": 0.4,
            "neg_margin": 0.8,
            "negatives": "batch",
            "foreground": 0.5,
        },
        formula=lambda s, t, ids: reference_alignment_loss(s, t, ids)[0],
        naive=naive_refalign,
    ),
    ContractCase(
        objective=Repa,
        settings={"teacher": ("dino", "clip"), "blocks": (1, 2), "projector_dim": 9},
        changes={"blocks": (2,), "teacher": "dino", "projector_dim": 8, **TOKEN_COSINE},
        formula=lambda s, t, ids: repa_loss(s, t),
        naive=naive_repa,
    ),
    ContractCase(
        objective=IRepa,
        settings={"teacher": ("dino", "clip"), "blocks": (0, 2)},
        changes={
            "blocks": (0,),
            "teacher": "dino",
            "gamma": 0.8,
            "projector": "mlp",
            "projector_dim": 8,
            "spatial_norm": False,
            **TOKEN_COSINE,
        },
        alongside={"projector_dim": {"projector": "mlp"}},
        formula=lambda s, t, ids: irepa_loss(frames(s), frames(t)),
        naive=naive_irepa,
    ),
    ContractCase(
        objective=Align4Gen,
        settings={"teacher": ("dino", "clip"), "blocks": (1, 2), "projector_dim": 9},
        changes={
            "blocks": (1,),
            "teacher": "clip",
            "normalization": "per_teacher",
            "projector_dim": 8,
            **TOKEN_COSINE,
        },
        formula=lambda s, t, ids: fused_alignment_loss(s, t.split(WIDTHS, -1)),
        naive=naive_align4gen,
    ),
    ContractCase(
        objective=M2Repa,
        settings={"teacher": ("dino", "clip"), "blocks": (1, 2), "projector_dim": 9},
        changes={
            "blocks": (1,),
            "teacher": ("clip", "dino"),
            "decouple": 0.7,
            "projector_dim": 8,
            **TOKEN_COSINE,
        },
        formula=lambda s, t, ids: decoupled_alignment_loss(
            s.split(WIDTHS, -1), t.split(WIDTHS, -1)
        ),
        naive=naive_m2_repa,
    ),
    ContractCase(
        objective=VideoRepa,
        settings={"teacher": "dino", "blocks": (0, 1), "projector_dim": 9},
        changes={
            "blocks": (1,),
            "teacher": "clip",
            "margin": 0.3,
            "reduction": "sum",
            "distance": "l2",
            "first_frame": "keep",
            "pool": 2,
            "grid": "student",
            "projector_dim": 8,
            "initial_weights": "xavier",
        },
        formula=lambda s, t, ids: token_relation_loss(frames(s), frames(t)),
        naive=naive_videorepa,
    ),
    ContractCase(
        objective=Sara,
        settings={"teacher": "dino", "blocks": (0, 1), "projector_dim": 9},
        changes={
            "blocks": (1,),
            "teacher": "clip",
            "routing": "xor",
            "tau": 0.5,
            "temporal_weight": 0.2,
            "saliency": "masks",
            "grid": "student",
            "projector_dim": 8,
        },
        alongside={"saliency": {"aligner": None}},
        formula=lambda s, t, ids: routed_relation_loss(frames(s), frames(t), saliency(s)),
        naive=naive_sara,
        prepare=with_aligners,
    ),
    ContractCase(
        objective=MoAlign,
        settings={"teacher": "dino", "blocks": (0, 1), "projector_dim": 9},
        changes={
            "blocks": (1,),
            "teacher": "clip",
            "tau": 0.5,
            "distance": "l2",
            "grid": "student",
            "projector_dim": 8,
        },
        formula=lambda s, t, ids: motion_relation_loss(frames(s), frames(t)),
        naive=naive_moalign,
        prepare=with_heads,
    ),
    ContractCase(
        objective=Crepa,
        settings={"teacher": "dino", "blocks": (0, 1), "projector_dim": 9},
        changes={
            "blocks": (1,),
            "teacher": "clip",
            "distance": 2,
            "tau": 0.5,
            "reduction": "mean",
            "projector": "linear",
            "projector_dim": 8,
            **TOKEN_COSINE,
        },
        alongside={"projector": {"projector_dim": None}},
        formula=lambda s, t, ids: cross_frame_loss(frames(s), frames(t)),
        naive=naive_crepa,
    ),
    ContractCase(
        objective=LayerSync,
        settings={"blocks": (0, 1), "deep_blocks": (1, 2)},
        changes={"blocks": (0,), "deep_blocks": (2, 2), "detach": False, **TOKEN_COSINE},
        alongside={"blocks": {"deep_blocks": (2,)}},
        formula=lambda s, t, ids: layersync_loss(s, t),
        naive=naive_repa,
    ),
    ContractCase(
        objective=Sra,
        settings={"blocks": (0, 1), "deep_blocks": (1, 2), "projector_dim": 9},
        changes={
            "blocks": (0,),
            "deep_blocks": (2, 1),
            "loss": "smooth_l1",
            "beta": 0.5,
            "projector_dim": 8,
            **TOKEN_COSINE,
        },
        alongside={"blocks": {"deep_blocks": (1,)}, "beta": {"loss": "smooth_l1"}},
        formula=lambda s, t, ids: self_alignment_loss(s, t),
        naive=naive_repa,
    ),
    ContractCase(
        objective=SelfFlow,
        settings={"blocks": (0, 1), "deep_blocks": (1, 2), "projector_dim": 9},
        changes={"blocks": (0,), "deep_blocks": (2, 1), "projector_dim": 8, **TOKEN_COSINE},
        alongside={"blocks": {"deep_blocks": (1,)}},
        formula=lambda s, t, ids: self_alignment_loss(s, t),
        naive=naive_repa,
    ),
    ContractCase(
        objective=VaeRepa,
        settings={"blocks": (1, 2), "projector_dim": 9},
        changes={"blocks": (2,), "projector_dim": 8, **TOKEN_COSINE},
        formula=lambda s, t, ids: vae_alignment_loss(s, t),
        naive=naive_repa,
    ),
    ContractCase(
        objective=Dispersive,
        settings={"blocks": (0, 1)},
        changes={"blocks": (1,), "tau": 1.0, "per_feature": False, "diagonal": False},
        formula=lambda s, t, ids: dispersive_loss(s, per_feature=True),
        naive=naive_dispersive,
    ),
    ContractCase(
        objective=LocalGramFlow,
        settings={
            "teacher": "clip",
            "blocks": (0, 1),
            "projector_dim": 9,
            "window": 3,
            "grid": "teacher",
        },
        changes={
            "blocks": (1,),
            "teacher": "dino",
            "window": 5,
            "temperature": 0.5,
            "normalize": False,
            "grid": "student",
            "projector_dim": 8,
        },
        formula=lambda s, t, ids: local_gram_flow_loss(squares(s), squares(t)),
        naive=naive_local_gram_flow,
    ),
    ContractCase(
        objective=HasteAttention,
        settings={"teacher": "dino", "blocks": (0, 1)},
        changes={"blocks": (2,), "teacher": "clip", "heads": 1},
        formula=lambda s, t, ids: attention_alignment_loss(
            frames(s), frames(t)[:, :, None], student_heads=5, teacher_heads=5
        ),
        naive=naive_haste_attention,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check, row: ContractCase, tmp_path: Path) -> None:
    check(row.ready(tmp_path))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_side_is_the_configs_grid(row: ContractCase, tmp_path: Path) -> None:
    case = row.ready(tmp_path)
    if "grid" in case.changes:
        assert [case.build(grid=side).side for side in ("student", "teacher")] == [
            "student",
            "teacher",
        ]
    else:
        assert case.build().side == "student"


def test_every_objective_has_a_row_and_a_readme_section() -> None:
    assert sorted(row.name for row in ROWS) == sorted(BUILT_IN)
    readme = (Path(alignlab.losses.__file__).parent / "README.md").read_text()
    for name, objective in BUILT_IN.items():
        assert f"\n## `{name}`" in readme
        assert objective.paper in readme  # it may have none


def test_unknown_objective_names_the_known_ones() -> None:
    config = ObjectiveConfig(name="rapa", blocks=(0,), teacher="dino")
    with pytest.raises(ValueError, match="unknown objective 'rapa': choose refalign, repa"):
        build_objective(config, student_dim=4, teacher_dims={"dino": 4})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tokens(torch.zeros(2, 7, 3), (2, 2, 2)),
        lambda: Tokens(torch.zeros(2, 8, 3), (2, 2, 2), torch.zeros(8, dtype=torch.int64)),
        lambda: Features(torch.zeros(2, 2, 5, 3), (2, 2, 2)),
        lambda: Features(torch.zeros(2, 8, 3), (2, 2, 2)),
    ],
)
def test_tokens_that_do_not_fill_their_grid_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"do not (fill|match)"):
        make()
