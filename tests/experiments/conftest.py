"""The tiny models and recipes of the harness's tests, for comparisons."""

import importlib.util
from pathlib import Path
from types import ModuleType

HARNESS = Path(__file__).parents[1] / "harness"


def _load(path: Path, name: str) -> ModuleType:
    # tests/ is no package, so that a conftest elsewhere cannot be imported by name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_models = _load(HARNESS / "conftest.py", "harness_models")
_runs = _load(HARNESS / "runs" / "conftest.py", "harness_runs")
wan_folder = _models.wan_folder
teacher_folder = _runs.teacher_folder
recipe_file = _runs.recipe_file
