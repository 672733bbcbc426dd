"""Separability and retrieval of subjects: goldens, plain-loop references, properties, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignlab.metrics import (
    cross_subject_cosine,
    retrieval_chance,
    silhouette,
    subject_retrieval,
    teacher_retrieval,
)

COUNT_24 = torch.arange(1, 25, dtype=torch.float64).reshape(6, 4)
S_64, T_64 = torch.sin(COUNT_24), torch.cos(COUNT_24 / 2)
PAIRS_6 = torch.tensor([0, 0, 1, 1, 2, 2])
UNEVEN_9 = torch.tensor([4, 4, 4, 7, 2, 2, 2, 2, 7])


def features(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(
        rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def distances(x_ND: Tensor) -> list[list[float]]:
    rows = x_ND.tolist()
    norms = [math.sqrt(sum(value * value for value in row)) for row in rows]
    return [
        [
            1 - sum(p * q for p, q in zip(rows[i], rows[j], strict=True)) / (norms[i] * norms[j])
            for j in range(len(rows))
        ]
        for i in range(len(rows))
    ]


def silhouette_by_loops(x_ND: Tensor, labels: list[int]) -> float:
    table, scores = distances(x_ND), []
    for i, own in enumerate(labels):
        mean = {}
        for label in set(labels):
            others = [j for j, other in enumerate(labels) if other == label and j != i]
            mean[label] = sum(table[i][j] for j in others) / len(others) if others else None
        a, b = mean[own], min(v for k, v in mean.items() if k != own and v is not None)
        scores.append(0.0 if a is None else (b - a) / max(a, b))
    return sum(scores) / len(scores)


def test_published_golden_values() -> None:
    assert silhouette(S_64, PAIRS_6) == pytest.approx(-0.53802214, abs=6e-9)
    assert silhouette(T_64, PAIRS_6) == pytest.approx(-0.36769660, abs=6e-9)
    push = cross_subject_cosine(S_64, PAIRS_6, T_64)
    assert push == pytest.approx(0.29167979, abs=6e-9), "RefAlign's own push term"


@pytest.mark.parametrize("labels_N", [UNEVEN_9, torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1])])
def test_separability_against_plain_loops(labels_N: Tensor) -> None:
    x_ND, labels = features(9, 4, 0), labels_N.tolist()
    table = distances(x_ND)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    inter = [table[i][j] for i, j in pairs if labels[i] != labels[j]]
    assert silhouette(x_ND, labels_N) == pytest.approx(silhouette_by_loops(x_ND, labels))
    assert cross_subject_cosine(x_ND, labels_N) == pytest.approx(
        sum(max(0.0, 1 - value) for value in inter) / len(inter)
    )


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_separability_ignores_basis_scale_and_label_names(seed: int, scale: float) -> None:
    x_ND = features(9, 6, seed)
    turn_DD = torch.linalg.qr(features(6, 6, seed + 1)).Q
    renamed_N = 100 - UNEVEN_9
    for metric in (silhouette, cross_subject_cosine):
        value = metric(x_ND, UNEVEN_9)
        assert metric(scale * x_ND @ turn_DD, renamed_N) == pytest.approx(value, rel=1e-8)


def test_separability_tells_apart_from_mixed() -> None:
    centres_SD, labels_N = torch.eye(3, 8, dtype=torch.float64), torch.arange(30) % 3
    apart_ND = centres_SD[labels_N] + 0.05 * features(30, 8, 1)
    mixed_ND = features(30, 8, 2)
    assert silhouette(apart_ND, labels_N) > 0.8 > 0.2 > silhouette(mixed_ND, labels_N)
    one_point_ND = torch.ones(30, 8)
    assert silhouette(one_point_ND, labels_N) == pytest.approx(0.0, abs=1e-2)
    assert cross_subject_cosine(one_point_ND, labels_N) == pytest.approx(1.0)


def test_padding_changes_nothing() -> None:
    x_ND, y_ND = features(9, 4, 3), features(9, 4, 4)
    padded_ND = torch.cat([x_ND[:5], 50 * features(3, 4, 5), x_ND[5:]])
    padded_y_ND = torch.cat([y_ND[:5], 50 * features(3, 4, 6), y_ND[5:]])
    labels_N = torch.cat([UNEVEN_9[:5], torch.tensor([-1, -1, -1]), UNEVEN_9[5:]])
    for metric in (silhouette, cross_subject_cosine):
        assert metric(padded_ND, labels_N) == metric(x_ND, UNEVEN_9)
    assert subject_retrieval(padded_ND, labels_N, padded_y_ND, labels_N) == subject_retrieval(
        x_ND, UNEVEN_9, y_ND, UNEVEN_9
    )
    assert retrieval_chance(labels_N, labels_N) == retrieval_chance(UNEVEN_9, UNEVEN_9)


def test_retrieval_by_hand() -> None:
    gallery_MD = torch.tensor([[1.0, 0.0], [0.9, 0.4], [0.0, 1.0]])
    gallery_labels_M = torch.tensor([5, 6, 6])
    query_ND = torch.tensor([[2.0, 0.1], [0.1, 3.0]])
    right_N, wrong_N = torch.tensor([5, 6]), torch.tensor([6, 6])
    assert subject_retrieval(query_ND, right_N, gallery_MD, gallery_labels_M) == 1.0
    assert subject_retrieval(query_ND, wrong_N, gallery_MD, gallery_labels_M) == 0.5
    # A query whose label is nowhere in the gallery is not counted.
    unknown_N = torch.tensor([5, 9])
    assert subject_retrieval(query_ND, unknown_N, gallery_MD, gallery_labels_M) == 1.0


def test_chance_level_is_that_of_random_features() -> None:
    labels_N = torch.tensor([0] * 30 + [1] * 10)
    chance = retrieval_chance(labels_N, labels_N)
    assert chance == pytest.approx((30 * 30 + 10 * 10) / 1600)
    drawn = []
    for seed in range(40):
        query_ND, gallery_MD = features(40, 30, seed), features(40, 30, 1000 + seed)
        drawn.append(subject_retrieval(query_ND, labels_N, gallery_MD, labels_N))
    assert sum(drawn) / len(drawn) == pytest.approx(chance, abs=0.05)


def subject_tokens(seed: int) -> tuple[Tensor, Tensor]:
    """Teacher tokens of 12 images of 4 subjects, 10 tokens each, and their subject."""
    images_N = torch.arange(120) // 10
    labels_N = images_N % 4
    subject_ND = 2.0 * features(4, 6, 100)[labels_N]
    return (
        subject_ND + features(12, 6, seed)[images_N] * 0.5 + features(120, 6, seed + 1),
        labels_N,
    )


def test_teacher_retrieval_reads_a_linear_student_and_not_a_blind_one() -> None:
    fit_ME, _ = subject_tokens(200)
    held_out_NE, labels_N = subject_tokens(300)
    mix_ED = features(6, 10, 102)
    offset_D = 40.0 * features(1, 10, 103)
    student_fit_MD, student_ND = fit_ME @ mix_ED + offset_D, held_out_NE @ mix_ED + offset_D
    own = teacher_retrieval(student_fit_MD, fit_ME, student_ND, held_out_NE, labels_N)
    assert own > 0.98, "a linear student finds its own teacher token"
    blind = teacher_retrieval(
        features(120, 10, 104), fit_ME, features(120, 10, 105), held_out_NE, labels_N
    )
    assert blind == pytest.approx(retrieval_chance(labels_N, labels_N), abs=0.15)


def test_teacher_retrieval_ignores_scale_offset_and_dead_channels() -> None:
    fit_ME, _ = subject_tokens(400)
    held_out_NE, labels_N = subject_tokens(500)
    student_fit_MD = torch.tanh(fit_ME @ features(6, 5, 106)) + features(120, 5, 107)
    student_ND = torch.tanh(held_out_NE @ features(6, 5, 106)) + features(120, 5, 108)
    value = teacher_retrieval(student_fit_MD, fit_ME, student_ND, held_out_NE, labels_N)
    assert 0.3 < value < 1.0
    scale_D, offset_D = features(1, 5, 109).exp(), 1000 * features(1, 5, 110)
    dead_N1 = torch.full((120, 1), 123.4, dtype=torch.float64)
    moved_fit_MD = torch.cat([student_fit_MD * scale_D + offset_D, dead_N1], 1)
    moved_ND = torch.cat([student_ND * scale_D + offset_D, dead_N1], 1)
    assert teacher_retrieval(moved_fit_MD, fit_ME, moved_ND, held_out_NE, labels_N) == value
    assert (
        teacher_retrieval(
            student_fit_MD, 3 * fit_ME + 50, student_ND, 3 * held_out_NE + 50, labels_N
        )
        == value
    )


def test_ridge_matters() -> None:
    fit_ME, _ = subject_tokens(600)
    held_out_NE, labels_N = subject_tokens(700)
    # Two nearly equal channels whose difference holds noise: only a small ridge reads it.
    student_fit_MD = fit_ME @ features(6, 6, 111) @ torch.diag(torch.logspace(0, -4, 6).double())
    student_ND = held_out_NE @ features(6, 6, 111) @ torch.diag(torch.logspace(0, -4, 6).double())
    mix_DD = features(6, 6, 112)
    values = {
        ridge: teacher_retrieval(
            student_fit_MD @ mix_DD,
            fit_ME,
            student_ND @ mix_DD,
            held_out_NE,
            labels_N,
            ridge=ridge,
        )
        for ridge in (1e-10, 10.0)
    }
    assert values[1e-10] > values[10.0]


X_42, L_4 = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: silhouette(X_42, torch.tensor([0, 0, 1])), r"labels_N must be \(4,\)"),
        (lambda: silhouette(X_42, torch.rand(4)), "must be integers"),
        (lambda: silhouette(X_42, torch.tensor([3, 3, -1, 3])), "two subjects, got 1"),
        (lambda: silhouette(torch.randn(2, 4, 2), L_4), "features_ND must be"),
        (lambda: cross_subject_cosine(X_42, L_4, torch.randn(4, 3)), "right_ND must be"),
        (lambda: subject_retrieval(X_42, L_4, torch.randn(4, 3), L_4), "one width"),
        (lambda: subject_retrieval(X_42, L_4, X_42, L_4 + 7), "of its own label"),
        (lambda: subject_retrieval(X_42, L_4 * 0 - 1, X_42, L_4), "is padding"),
        (lambda: teacher_retrieval(X_42, X_42[:3], X_42, X_42, L_4), "same rows, got 4 and 3"),
        (lambda: teacher_retrieval(X_42, X_42, X_42[:, :1], X_42, L_4), "same width"),
        (lambda: teacher_retrieval(X_42, X_42, X_42, X_42, L_4, ridge=0.0), "ridge must be"),
        (lambda: teacher_retrieval(X_42 / 0, X_42, X_42, X_42, L_4), "NaN or an infinity"),
    ],
)
def test_misuse_is_refused_by_name(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
