"""CKA, CKNNA, Frechet distance and IICR: goldens, plain-loop references, properties, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignlab.metrics import cka, cknna, frechet_distance, iicr
from alignlab.metrics.features import unit_rows

COUNT_24 = torch.arange(1, 25, dtype=torch.float64).reshape(6, 4)
S_64, T_64 = torch.sin(COUNT_24), torch.cos(COUNT_24 / 2)


def features(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(
        rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def rotation(width: int, seed: int) -> Tensor:
    turn_DD: Tensor = torch.linalg.qr(features(width, width, seed)).Q
    return turn_DD


def test_published_golden_values() -> None:
    # published with 1e-6 added to the root
    assert cka(S_64, T_64) == pytest.approx(0.83101456, rel=2e-6)
    assert cka(S_64, T_64, unbiased=True) == pytest.approx(0.73013787, rel=2e-6)
    assert cka(S_64, T_64) == pytest.approx(0.83101568, abs=6e-9)
    assert cka(S_64, T_64, unbiased=True) == pytest.approx(0.73013903, abs=6e-9)
    assert cknna(S_64, T_64, k=2) == pytest.approx(0.93503741, abs=6e-9)
    assert cknna(S_64, T_64, k=3) == pytest.approx(0.80388417, abs=6e-9)
    # both sets have rank 2: the other eigenvalues are rounding, whose roots differ by processor
    assert frechet_distance(S_64, T_64) == pytest.approx(0.77399554, abs=5e-8)


def cosine_rows(x_ND: Tensor) -> list[list[float]]:
    rows = x_ND.tolist()
    norms = [math.sqrt(sum(value * value for value in row)) for row in rows]
    return [
        [
            sum(p * q for p, q in zip(rows[i], rows[j], strict=True)) / (norms[i] * norms[j])
            for j in range(len(rows))
        ]
        for i in range(len(rows))
    ]


def hsic_by_loops(k: list[list[float]], other: list[list[float]]) -> float:
    """Song et al. 2012, equation 5, written with index sums only."""
    m = len(k)
    off = [(i, j) for i in range(m) for j in range(m) if i != j]
    trace = sum(k[i][j] * other[j][i] for i, j in off)
    sums = sum(k[i][j] for i, j in off) * sum(other[i][j] for i, j in off)
    chained = sum(k[i][j] * other[j][q] for i, j in off for q in range(m) if q != j)
    return (trace + sums / ((m - 1) * (m - 2)) - 2 * chained / (m - 2)) / (m * (m - 3))


def masked(kernel: list[list[float]], keep: list[set[int]]) -> list[list[float]]:
    m = len(kernel)
    return [[kernel[i][j] if j in keep[i] else 0.0 for j in range(m)] for i in range(m)]


def cknna_by_loops(left_ND: Tensor, right_NE: Tensor, k: int) -> float:
    left, right = cosine_rows(left_ND), cosine_rows(right_NE)
    m = len(left)

    def keeps(kernel: list[list[float]]) -> list[set[int]]:
        return [
            set(sorted((j for j in range(m) if j != i), key=lambda j: -row[j])[:k])
            for i, row in enumerate(kernel)
        ]

    left_keep, right_keep = keeps(left), keeps(right)
    both = [a & b for a, b in zip(left_keep, right_keep, strict=True)]
    cross = hsic_by_loops(masked(left, both), masked(right, both))
    own_left, own_right = masked(left, left_keep), masked(right, right_keep)
    root = math.sqrt(hsic_by_loops(own_left, own_left) * hsic_by_loops(own_right, own_right))
    return float(cross / (root + 1e-6))


@pytest.mark.parametrize(("rows", "k"), [(5, 2), (9, 4), (17, 10)])
def test_against_plain_loops(rows: int, k: int) -> None:
    left_ND, right_NE = features(rows, 3, 0), features(rows, 7, 1)
    left, right = cosine_rows(left_ND), cosine_rows(right_NE)
    root = math.sqrt(hsic_by_loops(left, left) * hsic_by_loops(right, right))
    expected = hsic_by_loops(left, right) / root
    assert cka(left_ND, right_NE, unbiased=True) == pytest.approx(expected, rel=1e-9)
    assert cknna(left_ND, right_NE, k) == pytest.approx(
        cknna_by_loops(left_ND, right_NE, k), rel=1e-9
    )


def dense_cknna(left_ND: Tensor, right_NE: Tensor, k: int) -> float:
    """With whole matrices, as the released code has them."""

    def kernel_and_mask(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
        unit_ND = unit_rows(rows_ND.double())
        kernel_NN = unit_ND @ unit_ND.T
        nearest_Nk = kernel_NN.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
        return kernel_NN, torch.zeros_like(kernel_NN).scatter_(1, nearest_Nk, 1.0)

    def hsic(a_NN: Tensor, b_NN: Tensor) -> Tensor:
        n = len(a_NN)
        sums = a_NN.sum() * b_NN.sum() / ((n - 1) * (n - 2))
        chained = a_NN.sum(0) @ b_NN.sum(1)
        return ((a_NN * b_NN.T).sum() + sums - 2.0 * chained / (n - 2)) / (n * (n - 3))

    (left_NN, left_mask_NN), (right_NN, right_mask_NN) = map(kernel_and_mask, (left_ND, right_NE))
    both_NN = left_mask_NN * right_mask_NN
    own = [hsic(m * x, m * x) for m, x in ((left_mask_NN, left_NN), (right_mask_NN, right_NN))]
    root = (own[0] * own[1]).clamp_min(0.0).sqrt()
    return float(hsic(both_NN * left_NN, both_NN * right_NN) / (root + 1e-6))


@pytest.mark.parametrize(("rows", "k"), [(5, 3), (37, 10), (400, 10)])
def test_pairs_alone_give_the_bits_of_whole_matrices(rows: int, k: int) -> None:
    shared_ND = features(rows, 6, 5)
    left_ND = torch.cat([shared_ND, features(rows, 4, 6)], 1)
    right_NE = torch.cat([features(rows, 5, 7), shared_ND], 1)
    assert cknna(left_ND, right_NE, k) == dense_cknna(left_ND, right_NE, k) > 0.0


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_alignment_ignores_basis_and_scale(seed: int, scale: float) -> None:
    left_ND, right_NE = features(12, 5, seed), features(12, 8, seed + 1)
    turned_NE = scale * right_NE @ rotation(8, seed + 2)
    for value, other in (
        (cka(left_ND, right_NE), cka(left_ND, turned_NE)),
        (cka(left_ND, right_NE, unbiased=True), cka(left_ND, turned_NE, unbiased=True)),
        (cknna(left_ND, right_NE, 4), cknna(left_ND, turned_NE, 4)),
        (cka(left_ND, right_NE), cka(right_NE, left_ND)),
    ):
        assert other == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_same_features_score_one_and_unrelated_ones_do_not() -> None:
    x_ND, unrelated_ND = features(64, 8, 3), features(64, 200, 4)
    assert cka(x_ND, x_ND) == pytest.approx(1.0, abs=1e-12)
    assert cknna(x_ND, x_ND) == pytest.approx(1.0, abs=1e-2)
    assert cka(x_ND, unrelated_ND, unbiased=True) == pytest.approx(0.0, abs=0.06)
    assert cka(x_ND, unrelated_ND) > 0.2, "the biased estimate is known to be inflated here"


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shared", [0.0, 10.0, 100.0])
def test_a_direction_that_all_rows_share_does_not_hide_likeness(
    unbiased: bool, shared: float
) -> None:
    """Centring takes it away; what is added to avoid 0 / 0 must not outweigh what is left."""
    x_ND, noise_ND = features(64, 32, 3), features(64, 32, 4)
    left_ND, right_NE = x_ND + shared, x_ND + 0.5 * noise_ND + shared
    assert cka(left_ND, left_ND, unbiased=unbiased) == pytest.approx(1.0, abs=1e-6)
    # the length of a row matters less the more they share: not the same value, but the same range
    assert 0.75 < cka(left_ND, right_NE, unbiased=unbiased) < 0.9


@pytest.mark.parametrize("unbiased", [False, True])
def test_collapsed_features_give_zero_not_nan(unbiased: bool) -> None:
    constant_ND, others_ND = torch.ones(8, 4), features(8, 4, 0)
    pairs = ((constant_ND, others_ND), (others_ND, constant_ND), (constant_ND, constant_ND))
    assert [cka(*pair, unbiased=unbiased) for pair in pairs] == [0.0] * 3


def test_half_precision_is_read_in_float64() -> None:
    low_ND = features(20, 6, 5).to(torch.bfloat16)
    other_ND = features(20, 6, 6).to(torch.bfloat16)
    assert cka(low_ND, other_ND) == cka(low_ND.double(), other_ND.double())
    assert frechet_distance(low_ND, other_ND) == frechet_distance(
        low_ND.double(), other_ND.double()
    )


def test_frechet_distance_of_known_gaussians() -> None:
    x_ND = features(50, 4, 7)
    shift_D = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert frechet_distance(x_ND, x_ND) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x_ND, x_ND + shift_D) == pytest.approx(5.25, rel=1e-9)
    trace = float(torch.cov(x_ND.T).trace())
    doubled = frechet_distance(x_ND, 2 * x_ND)
    assert doubled == pytest.approx(trace + float(x_ND.mean(0).square().sum()), rel=1e-9)


def test_frechet_distance_is_symmetric_and_turns_with_the_features() -> None:
    x_ND, y_MD, turn_DD = features(9, 12, 8), features(30, 12, 9), rotation(12, 10)
    value = frechet_distance(x_ND, y_MD)
    assert frechet_distance(y_MD, x_ND) == pytest.approx(value, rel=1e-6)
    assert frechet_distance(x_ND @ turn_DD, y_MD @ turn_DD) == pytest.approx(value, rel=1e-6)


def iicr_by_loops(frames_ND: Tensor, videos_N: Tensor, k: int) -> float:
    kernel, videos = cosine_rows(frames_ND), videos_N.tolist()
    shares = []
    for i, row in enumerate(kernel):
        others = sorted((j for j in range(len(row)) if j != i), key=lambda j: -row[j])[:k]
        shares.append(sum(videos[j] == videos[i] for j in others) / k)
    return float(sum(shares) / len(shares))


def test_iicr_against_plain_loops_and_its_shape() -> None:
    videos_N = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    centres_VD = 2.0 * features(3, 5, 11)
    frames_ND = centres_VD[videos_N] + features(10, 5, 12)
    values = [iicr(frames_ND, videos_N, k) for k in range(1, 10)]
    expected = [iicr_by_loops(frames_ND, videos_N, k) for k in range(1, 10)]
    assert values == pytest.approx(expected, rel=1e-12)
    assert values[-1] < values[0]
    clear_ND = centres_VD[videos_N] + 1e-3 * features(10, 5, 13)
    assert iicr(clear_ND, videos_N, 2) == 1.0


def test_iicr_of_many_frames_is_the_same_in_slices() -> None:
    frames_ND, videos_N = features(1100, 3, 14), torch.arange(1100) % 7
    perm_N = torch.randperm(1100, generator=torch.Generator().manual_seed(0))
    assert iicr(frames_ND, videos_N, 3) == pytest.approx(
        iicr(frames_ND[perm_N], videos_N[perm_N], 3), abs=1e-12
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cka(torch.zeros(3, 2, 2), torch.zeros(3, 2)), "left_ND must be"),
        (lambda: cka(torch.randn(3, 2), torch.randn(4, 2)), "same rows, got 3 and 4"),
        (lambda: cka(torch.randn(3, 2), torch.randn(3, 2), unbiased=True), "at least 4 rows"),
        (lambda: cka(torch.ones(4, 2, dtype=torch.int64), torch.randn(4, 2)), "floating point"),
        (lambda: cka(torch.full((4, 2), torch.nan), torch.randn(4, 2)), "NaN or an infinity"),
        (lambda: cknna(torch.randn(6, 2), torch.randn(6, 2)), r"k must be in 2 \.\. 5"),
        (lambda: cknna(torch.randn(6, 2), torch.randn(6, 2), 1), "got 1"),
        (lambda: frechet_distance(torch.randn(6, 2), torch.randn(6, 3)), "one width"),
        (lambda: frechet_distance(torch.randn(1, 2), torch.randn(6, 2)), "at least 2 rows"),
        (lambda: iicr(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), 1), "two videos"),
        (lambda: iicr(torch.randn(4, 2), torch.tensor([0, 0, 1]), 1), r"must be \(4,\)"),
        (lambda: iicr(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]), 4), r"k must be in 1 \.\. 3"),
    ],
)
def test_misuse_is_refused_by_name(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
