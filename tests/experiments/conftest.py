"""The tiny models and recipes of the harness's tests, for comparisons."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HARNESS = Path(__file__).parents[1] / "harness"


def _load(path: Path, name: str) -> ModuleType:
    # tests/ is no package, so that a conftest elsewhere cannot be imported by name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ray_tools() -> ModuleType:
    """Clusters of several nodes on this machine, and commands on them."""
    return _load(Path(__file__).with_name("ray_tools.py"), "ray_tools")


@pytest.fixture(scope="session")
def browser() -> ModuleType:
    """Opens and prints pages."""
    tools = _load(Path(__file__).with_name("browser_tools.py"), "browser_tools")
    if not tools.CHROMIUM:
        pytest.skip("no chromium or google-chrome is installed")
    return tools


_models = _load(HARNESS / "conftest.py", "harness_models")
_runs = _load(HARNESS / "runs" / "conftest.py", "harness_runs")
wan_folder = _models.wan_folder
teacher_folder = _runs.teacher_folder
recipe_file = _runs.recipe_file
