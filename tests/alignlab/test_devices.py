"""Where the tests compute: a GPU is hidden from all but those that are for it."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1]
MANY: dict[str, Any] = {"option": SimpleNamespace(numprocesses=2)}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`conftest.py` as it is where `ALIGNLAB_TEST_GPU=1`."""
    monkeypatch.setenv("ALIGNLAB_TEST_GPU", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    spec = importlib.util.spec_from_file_location("tests_on_gpu", FOLDER / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    return module


def item(name: str, *markers: str) -> Any:
    return SimpleNamespace(
        name=name,
        path=FOLDER / name,
        get_closest_marker=lambda marker: marker if marker in markers else None,
    )


def configuration(**settings: Any) -> tuple[Any, list[str]]:
    """That of pytest, and the plugins that it is told to load."""
    plugins: list[str] = []
    manager = SimpleNamespace(import_plugin=plugins.append)
    return SimpleNamespace(
        **{"option": SimpleNamespace(), "pluginmanager": manager} | settings
    ), plugins


def test_no_gpu_is_seen_by_a_test_or_by_what_it_starts() -> None:
    assert torch.cuda.device_count() == 0 and not torch.cuda.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_asked_for_a_gpu_only_its_tests_are_run(on_gpu: ModuleType) -> None:
    items = [item("test_a.py"), item("test_b.py", "gpu"), item("kernels/test_c.py", "slow")]
    left: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left.extend(items))
    on_gpu.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    assert [found.name for found in items] == ["test_b.py", "kernels/test_c.py"]
    assert [found.name for found in left] == ["test_a.py"]
    try:
        on_gpu.pytest_runtest_setup(items[0])
    except pytest.skip.Exception:
        pytest.fail("skipped where it was asked for")


def test_asked_for_a_gpu_that_is_not_there_nothing_is_run(
    on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, plugins = configuration()
    with pytest.raises(pytest.UsageError, match=r"^ALIGNLAB_TEST_GPU=1, but torch finds no CUDA"):
        on_gpu.pytest_configure(config)
    assert plugins == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu.pytest_configure(config)
    assert plugins == ["shared_fixtures"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 1), (MANY | {"workerinput": {}}, 1), (MANY, 0)],
    ids=["alone", "a worker", "deals tests"],
)
def test_who_only_deals_tests_to_workers_does_not_load_what_they_need(
    on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config, plugins = configuration(**settings)
    on_gpu.pytest_configure(config)
    assert len(plugins) == expected
