"""Keys: equal where all that a value depends on is, and nowhere else."""

import subprocess
import sys
from typing import Any

import pytest

from alignlab.dataset_cache.key import CacheKey


def test_order_of_parts_does_not_count() -> None:
    first, second = CacheKey("text", {"a": 1, "b": "x"}), CacheKey("text", {"b": "x", "a": 1})
    assert first == second and first.digest == second.digest and len({first, second}) == 1


@pytest.mark.parametrize(
    "other",
    [
        CacheKey("video", {"a": 1, "b": ("x", 2)}),
        CacheKey("text", {"a": 1.0, "b": ("x", 2)}),
        CacheKey("text", {"a": True, "b": ("x", 2)}),
        CacheKey("text", {"a": "1", "b": ("x", 2)}),
        CacheKey("text", {"a": 1, "b": ("x", 2), "c": 0}),
        CacheKey("text", {"a": 1, "b": (("x", 2),)}),
        CacheKey("text", {"a": 1, "b": ("x, 2",)}),
        CacheKey("text", {"a": 1, "b": ("x2",)}),
    ],
)
def test_every_part_counts(other: CacheKey) -> None:
    assert other.digest != CacheKey("text", {"a": 1, "b": ("x", 2)}).digest


def test_digest_stays_what_it_is() -> None:
    # What is cached would be a miss, silently, if this changed.
    key = CacheKey("teacher", {"clip": "café \ud800", "frames": (0, 2), "scale": 0.1, "x": False})
    assert key.digest == "9434a4ed9f1678e4acbc6b6c268ebbd25ace069bba63cf199dd6d99f2d4923a2"


def test_later_changes_of_a_mapping_change_no_key() -> None:
    parts: dict[str, Any] = {"a": 1}
    key = CacheKey("text", parts)
    digest = key.digest
    parts["a"] = 2
    assert key.parts == {"a": 1} and CacheKey("text", {"a": 1}).digest == digest


@pytest.mark.parametrize("part", [None, [1], {"a": 1}, b"x", (1, None), object()])
def test_other_parts_are_refused(part: Any) -> None:
    with pytest.raises(TypeError, match="a part is a str, int, float, bool"):
        CacheKey("text", {"a": part})


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="a: nan is not finite"):
        CacheKey("text", {"a": (0.5, float("nan"))})


def test_keys_need_no_torch() -> None:
    code = "import sys, alignlab.dataset_cache.key; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
