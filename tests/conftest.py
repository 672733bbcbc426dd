"""Tests compute on the CPU, unless `ALIGNLAB_TEST_GPU=1` asks for those that are for a GPU.

Many tests compare the bits of two runs, which a GPU does not promise. So a GPU is hidden from them,
and from the processes that they start. Those that are for a GPU are the tests marked `gpu` and all
in `kernels/`, which otherwise run in Triton's interpreter.
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

ON_GPU = os.environ.get("ALIGNLAB_TEST_GPU") == "1"
KERNELS = Path(__file__).parent / "kernels"
# Begun first, so that no worker of `make test` is left with one of them while others are idle.
LONGEST = (
    "test_readme.py",
    "test_ranks.py",
    "test_sharding.py",
    "test_every_objective.py",
    "test_plan_command.py",
    "test_docs_commands.py",
    "test_sweep_workers.py",
    "test_gpu_builds_pull_push.py",
    "test_gpu_builds_relation.py",
    "test_plugins.py",
    "test_layout.py",
)

# Digests of files are remembered in no user's cache.
CACHE = Path(tempfile.mkdtemp(prefix="alignlab-tests-"))
os.environ["ALIGNLAB_CACHE"] = str(CACHE)
# Read when triton is first imported.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a device
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    if ON_GPU:
        import torch  # below the environment variables, as all that imports Triton

        if not torch.cuda.is_available():
            raise pytest.UsageError("ALIGNLAB_TEST_GPU=1, but torch finds no CUDA device")
    if not only_deals_tests(config):
        config.pluginmanager.import_plugin("shared_fixtures")


def only_deals_tests(config: pytest.Config) -> bool:
    """Whether this process of pytest-xdist starts workers, and runs no test itself."""
    return bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else Triton's binding tells at the end what was never collected
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if ON_GPU:
        others = [item for item in items if not is_for_gpu(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if is_for_gpu(item)]


def pytest_collection_finish() -> None:
    # Every training collects garbage once; what has been imported and collected until here never is
    # any, and to search it takes half a second.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not ON_GPU:
        pytest.skip("needs a CUDA device and ALIGNLAB_TEST_GPU=1")


def is_for_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None or item.path.is_relative_to(KERNELS)
