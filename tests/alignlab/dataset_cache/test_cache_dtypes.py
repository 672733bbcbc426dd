"""What lossy dtypes keep: cosine errors within bounds, the same bits every time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.dataset_cache.key import CacheKey, StorageDtype
from alignlab.dataset_cache.shard_folder import ShardFolder
from alignlab.dataset_cache.shard_index import entry_id
from alignlab.dataset_cache.storage_dtypes import cosine_error, is_exact, store_lossy
from alignlab.dataset_cache.store import DatasetCache
from alignlab.teachers import load_teacher
from cache_entries import same_bits, same_tensors
from random_tensors import draw

KEY = CacheKey("teacher", {"clip": "a"})
# Relative error of a number: half a step of bf16 and e4m3; of int8, half a step of the largest.
STEPS = {"bf16": 2**-8, "fp8": 2**-4, "int8": 0.5 / 127}
BITS = {"bf16": 16, "fp8": 8, "int8": 8}
LOSSY: list[StorageDtype] = ["bf16", "fp8", "int8"]


@given(st.sampled_from(LOSSY), st.integers(0, 99), st.floats(1e-30, 1e30), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_numbers_stay_within_half_a_step(
    dtype: StorageDtype, seed: int, size: float, width: int
) -> None:
    values = draw(3, 5, width, seed=seed) * size
    error = (store_lossy(values, dtype).read() - values).abs()
    largest = values.abs().amax(-1, keepdim=True)
    if dtype == "int8":
        assert (error <= largest * STEPS[dtype] * 1.001).all()
    else:  # e4m3 has no smaller steps than 2^-9 of 448
        floor = largest / 448 * 2**-10 if dtype == "fp8" else 0
        assert (error <= (values.abs() * STEPS[dtype]).clamp(min=floor) * 1.001).all()


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 4e-6), ("fp8", 8e-4), ("int8", 2e-4)])
def test_cosine_errors_of_teacher_features(
    tmp_path: Path, dtype: StorageDtype, bound: float
) -> None:
    # Of the shipped teacher, which is DINO-like; of real clips: docs/dataset_cache.md.
    teacher = load_teacher("dinov2", path="assets/tiny-dino", feature="post_norm")
    frames = (draw(1, 2, 32, 32, 3) * 60 + 120).clamp(0, 255).to(torch.uint8)
    features = teacher.encode(frames, (8, 8)).tokens_BTPD
    with DatasetCache(tmp_path, "write", dtype) as cache:
        written = cache.write(KEY, {"tokens": features})["tokens"]
    error = 1 - torch.cosine_similarity(written.double(), features.double(), dim=-1)
    assert 0 < error.max() < bound
    [copy] = ShardFolder(tmp_path).find(entry_id(KEY, dtype))
    kept = copy.row.cosine_error
    assert kept is not None and 0 < kept.mean < kept.max < bound
    assert kept.max == pytest.approx(float(error.max()), rel=1e-3)
    assert kept.mean == pytest.approx(float(error.mean()), rel=1e-3)
    scales = features[..., 0].numel() * 4 * (dtype != "bf16")
    assert copy.row.size == features.numel() * BITS[dtype] // 8 + scales


@pytest.mark.parametrize("dtype", LOSSY)
def test_what_is_written_is_what_is_read(tmp_path: Path, dtype: StorageDtype) -> None:
    given = {"tokens": draw(2, 3, 16), "half": draw(4, 8, seed=1).half(), "grid": torch.arange(3)}
    with DatasetCache(tmp_path, "write", dtype) as cache:
        written = cache.write(KEY, given)
        assert same_tensors(cache.read(KEY), written)  # from the buffer
    assert same_tensors(cache.read(KEY), written)
    assert same_tensors(DatasetCache(tmp_path, "read", dtype).read(KEY), written)
    for mode in ("read", "require"):  # a run's numbers do not depend on the mode
        assert same_tensors(DatasetCache(tmp_path, mode, dtype).write(KEY, given), written)
    assert {n: t.dtype for n, t in written.items()} == {n: t.dtype for n, t in given.items()}
    assert same_bits(written["grid"], given["grid"])
    assert not torch.equal(written["tokens"], given["tokens"])


def test_a_cache_reads_no_other_dtype(tmp_path: Path) -> None:
    every: list[StorageDtype] = ["fp32", *LOSSY]
    tensors = {"tokens": draw(2, 16)}
    for dtype in every:
        cache = DatasetCache(tmp_path, "write", dtype)
        assert cache.read(KEY) is None
        with cache:
            cache.write(KEY, tensors)
    read = [DatasetCache(tmp_path, "read", dtype).read(KEY) for dtype in every]
    assert len({tuple(one["tokens"].flatten().tolist()) for one in read if one}) == 4


@pytest.mark.parametrize("kind", ["text", "video", "reference"])
@pytest.mark.parametrize("dtype", LOSSY)
def test_all_but_teacher_features_is_exact(tmp_path: Path, kind: Any, dtype: StorageDtype) -> None:
    key, tensors = CacheKey(kind, {"a": 1}), {"x": draw(4, 4)}
    with DatasetCache(tmp_path, "write", dtype) as cache:
        assert same_tensors(cache.write(key, tensors), tensors)
    assert same_tensors(DatasetCache(tmp_path, "read").read(key), tensors)


@pytest.mark.parametrize("dtype", LOSSY)
@pytest.mark.parametrize(
    "values",
    [
        torch.tensor(0.5),
        torch.empty(0, 4),
        torch.tensor([[1.0, float("nan")], [2.0, 3.0]]),
        torch.tensor([[1.0, float("-inf")]]),
        torch.tensor([[3.4e38, 1.0]]) * torch.tensor([1.0, -1.0]),
        torch.tensor([[True, False]]),
        torch.tensor([[1, 2]]),
    ],
    ids=["0-d", "empty", "nan", "inf", "near the largest", "bool", "int"],
)
def test_what_cannot_be_rounded_is_exact_or_finite(
    dtype: StorageDtype, values: torch.Tensor
) -> None:
    stored = store_lossy(values, dtype)
    is_large = values.dtype == torch.float32 and values.numel() == 2
    if is_large and values.isfinite().all():
        assert stored.read().isfinite().all()
    else:
        assert is_exact(stored) and same_bits(stored.read(), values)
        assert cosine_error({"a": values}, {"a": stored}) is None


@pytest.mark.parametrize("dtype", LOSSY)
def test_zeros_have_no_error(dtype: StorageDtype) -> None:
    values = torch.zeros(2, 4)
    values[1] = 1.0
    stored = store_lossy(values, dtype)
    assert torch.equal(stored.read(), values)
    error = cosine_error({"a": values}, {"a": stored})
    assert error is not None and error.max < 1e-12


def test_int8_loses_what_fp8_keeps_beside_an_outlier() -> None:
    values = draw(64, 256)
    values[:, 7] = 200.0
    kept = {d: store_lossy(values, d).read() for d in LOSSY}
    rest = torch.arange(256) != 7
    error = {
        d: float((1 - torch.cosine_similarity(v[:, rest], values[:, rest], dim=-1)).mean())
        for d, v in kept.items()
    }
    assert error["bf16"] < error["fp8"] < 1e-3 < error["int8"]
