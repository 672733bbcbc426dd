"""Tests compute on the CPU, unless `ALIGNLAB_TEST_GPU=1` asks for those that are for a GPU.

Many tests compare the bits of two runs, which a GPU does not promise. So a GPU is hidden from them,
and from the processes that they start. Those that are for a GPU are the tests marked `gpu` and all
in `kernels/`, which otherwise run in Triton's interpreter.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

ON_GPU = os.environ.get("ALIGNLAB_TEST_GPU") == "1"
KERNELS = Path(__file__).parent / "kernels"
# Begun first, so that no worker of `make test` is left with one of them while others are idle.
LONGEST = ("test_readme.py", "test_ranks.py", "test_sweep_workers.py")

# Digests of files are remembered in no user's cache.
CACHE = Path(tempfile.mkdtemp(prefix="alignlab-tests-"))
os.environ["ALIGNLAB_CACHE"] = str(CACHE)
# Read when triton is first imported.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a device
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Below the environment variables, since these import Triton.
from alignlab.progress import tell_once, warn_once  # noqa: E402
from loaded_models import loaded_models  # noqa: E402
from tiny_runs import (  # noqa: E402
    full_run,
    lora_run,
    make_config,
    recipe_file,
    teacher_folder,
    train_until,
)
from tiny_wan import wan_folder  # noqa: E402

__all__ = [
    "full_run",
    "loaded_models",
    "lora_run",
    "make_config",
    "recipe_file",
    "teacher_folder",
    "train_until",
    "wan_folder",
]


@pytest.fixture(autouse=True)
def _nothing_is_told_yet() -> None:
    """Each test is a command of its own."""
    warn_once.cache_clear()
    tell_once.cache_clear()


def pytest_configure() -> None:
    if ON_GPU and not torch.cuda.is_available():
        raise pytest.UsageError("ALIGNLAB_TEST_GPU=1, but torch finds no CUDA device")


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if ON_GPU:
        others = [item for item in items if not is_for_gpu(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if is_for_gpu(item)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not ON_GPU:
        pytest.skip("needs a CUDA device and ALIGNLAB_TEST_GPU=1")


def is_for_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None or item.path.is_relative_to(KERNELS)
