"""RefAlign: golden values, samples without references, and its released defaults."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignlab.kernels.pull_push import PullPush, pull_push
from alignlab.losses import build_objective
from alignlab.losses.objective import Context, Features, Tokens
from alignlab.losses.refalign import (
    Negatives,
    RefAlign,
    RefAlignConfig,
    reference_alignment_loss,
)
from random_tensors import draw, golden_pair

SINE, COSINE = golden_pair(1, 6, 4)
IDS = torch.tensor([[0, 0, 1, 1, 2, 2]])


def build(**settings: Any) -> RefAlign:
    config = RefAlignConfig(teacher="dino", **{"blocks": (0,), **settings})
    objective = build_objective(config, student_dim=6, teacher_dims={"dino": 5})
    assert isinstance(objective, RefAlign)
    return objective


def test_reproduces_the_values_of_the_authors_code() -> None:
    total, pull, push = reference_alignment_loss(SINE, COSINE, IDS)
    assert total.shape == pull.shape == push.shape == (1,)
    assert total.item() == pytest.approx(1.29073177, abs=5e-9)
    assert pull.item() == pytest.approx(0.99905198, abs=5e-9)
    assert push.item() == pytest.approx(0.29167979, abs=5e-9)


@pytest.mark.parametrize("neg_weight", [0.0, 0.3])
def test_neg_weight_scales_the_push_only(neg_weight: float) -> None:
    total, pull, push = reference_alignment_loss(SINE, COSINE, IDS, neg_weight=neg_weight)
    torch.testing.assert_close(total, pull + neg_weight * push)
    assert push.item() == pytest.approx(0.29167979, abs=5e-9)


def test_no_loss_for_orthogonal_subjects_that_match_their_teacher() -> None:
    teacher_BND = torch.eye(4).repeat_interleave(2, 0)[None]
    ids_BN = torch.arange(4).repeat_interleave(2)[None]
    for terms in reference_alignment_loss(2 * teacher_BND, teacher_BND, ids_BN):
        assert terms.tolist() == [0.0]


def test_white_padding_shared_by_two_references_leaves_a_floor_under_the_push() -> None:
    background, red, blue = torch.eye(3)
    teacher_BND = torch.stack([red, background, blue, background])[None]
    _, pull, push = reference_alignment_loss(teacher_BND, teacher_BND, torch.tensor([[0, 0, 1, 1]]))
    assert pull.item() == 0
    assert push.item() == pytest.approx(2 / 8)


def test_a_sample_without_references_gives_nothing_and_trains_nothing() -> None:
    objective = build(blocks=(0, 1))
    ids_BN = torch.full((1, 8), -1)
    student = {block: Tokens(draw(1, 8, 6), (2, 2, 2), ids_BN) for block in (0, 1)}
    terms = objective(student, {"dino": Features(draw(1, 2, 4, 5), (2, 2, 2))})
    assert terms.loss_B.tolist() == [0.0]
    terms.loss_B.sum().backward()
    for parameter in objective.parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all()


def test_a_batch_without_a_single_reference_frame_is_zero_too() -> None:
    empty = Tokens(torch.zeros(2, 0, 6), (0, 2, 2), torch.zeros(2, 0, dtype=torch.int64))
    terms = build()({0: empty}, {"dino": Features(torch.zeros(2, 0, 4, 5), (0, 2, 2))})
    assert terms.loss_B.tolist() == [0.0, 0.0]


def test_parts_and_similarity_are_means_over_blocks() -> None:
    objective = build(blocks=(0, 3), neg_weight=0.7)
    ids_BN = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 0]])
    student = {b: Tokens(draw(2, 4, 6, seed=b), (1, 2, 2), ids_BN) for b in (0, 3)}
    features = Features(draw(2, 1, 4, 5, seed=9), (1, 2, 2))
    terms = objective(student, {"dino": features})
    expected, cosines = [], []
    for block in (0, 3):
        projected = objective.projectors[f"block_{block}"](student[block].tokens_BND)
        expected.append(
            reference_alignment_loss(
                projected, features.tokens_BTPD.flatten(1, 2), ids_BN, neg_weight=0.7
            )
        )
        cosines.append(1 - expected[-1][1])
    for have, index in ((terms.loss_B, 0), (terms.parts["pull"], 1), (terms.parts["push"], 2)):
        torch.testing.assert_close(have, (expected[0][index] + expected[1][index]) / 2)
    torch.testing.assert_close(terms.similarity_B, (cosines[0] + cosines[1]) / 2)


@pytest.mark.parametrize("negatives", ["sample", "batch"])
def test_leading_dimensions_have_values_of_their_own(negatives: Negatives) -> None:
    student_LBND, teacher_BND = draw(2, 3, 4, 5), draw(3, 4, 5, seed=1)
    ids_BN = torch.tensor([[0, 0, 1, 1], [1, 1, 2, -1], [-1, -1, -1, -1]])
    settings: dict[str, Any] = {"neg_weight": 0.7, "negatives": negatives}
    stacked = reference_alignment_loss(student_LBND, teacher_BND, ids_BN, **settings)
    for block, student_BND in enumerate(student_LBND):
        alone = reference_alignment_loss(student_BND, teacher_BND, ids_BN, **settings)
        for have, want in zip(stacked, alone, strict=True):
            torch.testing.assert_close(have[block], want)


def test_all_blocks_go_through_the_kernel_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def counted(student: Tensor, teacher: Tensor, ids: Tensor, **settings: Any) -> PullPush:
        shapes.append((*student.shape, *teacher.shape))
        return pull_push(student, teacher, ids, **settings)

    monkeypatch.setattr("alignlab.losses.refalign.pull_push", counted)
    student = {b: Tokens(draw(2, 4, 6), (1, 2, 2), torch.zeros(2, 4).long()) for b in (0, 1, 3)}
    build(blocks=(0, 1, 3))(student, {"dino": Features(draw(2, 1, 4, 5), (1, 2, 2))})
    assert shapes == [(3, 2, 4, 5, 2, 4, 5)]


def test_similarity_ignores_the_margin_and_the_push() -> None:
    student = {0: Tokens(draw(2, 4, 6), (1, 2, 2), torch.tensor([[0, 0, 1, 1], [0, 0, 0, -1]]))}
    teacher = {"dino": Features(draw(2, 1, 4, 5, seed=1), (1, 2, 2))}
    plain = build()(student, teacher)
    other = build(pos_margin=0.9, neg_margin=0.5, neg_weight=3.0)(student, teacher)
    assert not torch.equal(plain.loss_B, other.loss_B)
    torch.testing.assert_close(plain.similarity_B, other.similarity_B)


def test_defaults_are_the_papers() -> None:
    config = RefAlignConfig(teacher="dino")
    assert config.blocks == tuple(range(9)) and config.gate.kind == "none"
    assert (config.weight, config.neg_weight) == (1.0, 1.0)
    assert (config.pos_margin, config.neg_margin) == (0.0, 1.0)


def test_one_projector_per_block_with_the_released_shapes() -> None:
    objective = build_objective(
        RefAlignConfig(teacher="dino"), student_dim=1536, teacher_dims={"dino": 1024}
    )
    assert isinstance(objective, RefAlign) and len(objective.projectors) == 9
    linears = [layer for layer in objective.modules() if isinstance(layer, nn.Linear)]
    assert {tuple(layer.weight.shape) for layer in linears} == {(768, 1536), (1024, 768)}
    assert all(layer.bias is None for layer in linears)
    # torch's default for a linear layer: uniform within 1/sqrt(in).
    bound = linears[0].weight.abs().max().item() * 1536**0.5
    assert bound == pytest.approx(1.0, abs=1e-3)


def test_tokens_without_subject_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="subject ids"):
        build()(
            {0: Tokens(draw(1, 4, 6), (1, 2, 2))},
            {"dino": Features(draw(1, 1, 4, 5), (1, 2, 2))},
        )


def test_references_are_never_averaged_like_video_frames() -> None:
    ids_BN = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="different numbers of references"):
        build()(
            {0: Tokens(draw(1, 8, 6), (2, 2, 2), ids_BN)},
            {"dino": Features(draw(1, 3, 4, 5), (3, 2, 2))},
        )


def test_negatives_across_the_batch_are_all_pairs_of_different_subjects() -> None:
    student, teacher = draw(3, 4, 5).double(), draw(3, 4, 5, seed=1).double()
    # subject 1 is shown in two samples, the last sample shows none
    ids = torch.tensor([[0, 0, 1, 1], [1, 1, 2, -1], [-1, -1, -1, -1]])
    _, pull, push = reference_alignment_loss(student, teacher, ids, negatives="batch")
    places = [(b, n) for b in range(3) for n in range(4) if ids[b, n] >= 0]
    pairs = [(p, q) for p in places for q in places if ids[p] != ids[q]]
    cosines = [float(torch.cosine_similarity(student[p], teacher[q], dim=0)) for p, q in pairs]
    expected = sum(max(0.0, cosine) for cosine in cosines) / len(pairs)
    torch.testing.assert_close(push, torch.tensor([expected, expected, 0.0]).double())
    torch.testing.assert_close(pull, reference_alignment_loss(student, teacher, ids)[1])


def test_foreground_leaves_out_tokens_that_show_too_little_of_their_subject() -> None:
    student = Tokens(draw(1, 8, 6), (2, 2, 2), torch.tensor([[0] * 4 + [1] * 4]))
    teacher = {"dino": Features(draw(1, 2, 4, 5), (2, 2, 2))}
    context = Context(foreground_BN=torch.tensor([[1.0, 0.5, 0.4, 0.0, 0.0, 0.5, 0.2, 1.0]]))
    objective = build(foreground=0.5)
    assert objective.needs == {"foreground"} and not build().needs
    ids = torch.tensor([[0, 0, -1, -1, -1, 1, -1, 1]])
    alone = build()({0: Tokens(student.tokens_BND, (2, 2, 2), ids)}, teacher)
    terms = objective({0: student}, teacher, context)
    torch.testing.assert_close(terms.loss_B, alone.loss_B)
    assert not torch.allclose(terms.loss_B, build()({0: student}, teacher).loss_B)
    nothing = Context(foreground_BN=torch.full((1, 8), 0.4))
    assert terms.aligned_B.tolist() == [True]
    assert objective({0: student}, teacher, nothing).aligned_B.tolist() == [False]
    with pytest.raises(ValueError, match="needs the foreground"):
        objective({0: student}, teacher)


@pytest.mark.parametrize("pos_margin", [0.0, 0.6])
def test_the_similarity_is_the_mean_cosine_of_tokens_that_show_a_subject(pos_margin: float) -> None:
    ids_BN = torch.tensor([[0, 0, 1, -1], [-1, -1, -1, -1]])
    student, teacher = draw(2, 4, 6), draw(2, 1, 4, 5)
    objective = build(pos_margin=pos_margin)
    terms = objective(
        {0: Tokens(student, (1, 2, 2), ids_BN)}, {"dino": Features(teacher, (1, 2, 2))}
    )
    projected = objective.projectors["block_0"](student[0, :3])
    cosines = torch.cosine_similarity(projected, teacher[0, 0, :3], dim=1)
    assert terms.similarity_B is not None and terms.similarity_LB is not None
    expected = torch.stack([cosines.mean(), torch.tensor(0.0)])
    torch.testing.assert_close(terms.similarity_B, expected)
    torch.testing.assert_close(terms.similarity_LB, expected[None])
