"""Packages that are installed: as far as this process's entry points can tell, or by pip."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from alignlab.evaluation.own_metrics import installed_metrics
from alignlab.kernels.registry import installed_kernels

TESTS = Path(__file__).parents[1]
TINY_KERNEL = TESTS / "kernels" / "external" / "tiny_kernel.py"
TINY_METRIC = TESTS / "alignlab" / "external" / "tiny_metric.py"
FLAGS = (
    "--quiet",
    "--no-deps",
    "--no-index",
    "--no-build-isolation",
    "--disable-pip-version-check",
)
# A process that imports alignlab takes seconds: one answers all that is asked of an installation.
COMMANDS = """
import json, sys
from typer.testing import CliRunner
from alignlab.cli import app
done = [CliRunner().invoke(app, words) for words in json.loads(sys.argv[1])]
print(json.dumps([(each.exit_code, each.stdout, each.stderr) for each in done]))
"""


class Answer(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def write_package(
    folder: Path, package: str, group: str, *, version: str = "1.0", **entries: str
) -> None:
    """Writes what an installer would leave of a package that registers `entries` in a group."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))


@contextmanager
def kernel_package(folder: Path, package: str = "tiny-kernels", **entries: str) -> Iterator[None]:
    """Installs a package with `tiny_kernel.py` in `folder`, until the end of the block.

    Args:
        folder: to install into; more packages may be installed there.
        package: its name.
        entries: kernels that it registers, such as `mine="tiny_kernel:BY_PRODUCT"`.
    """
    with _installed(folder, TINY_KERNEL, installed_kernels.cache_clear):
        write_package(folder, package, "alignlab.kernels", **entries)
        yield


@contextmanager
def metric_package(
    folder: Path, package: str = "tiny-metrics", *, version: str = "1.0", **entries: str
) -> Iterator[None]:
    """Installs a package with `tiny_metric.py` in `folder`, until the end of the block.

    Args:
        folder: to install into; more packages may be installed there.
        package: its name.
        version: of it.
        entries: metrics that it registers, such as `sharp="tiny_metric:SHARP"`.
    """
    with _installed(folder, TINY_METRIC, installed_metrics.cache_clear):
        write_package(folder, package, "alignlab.metrics", version=version, **entries)
        yield


@contextmanager
def _installed(folder: Path, module: Path, forget: Callable[[], None]) -> Iterator[None]:
    """Has a module imported from a folder, and what was registered before is forgotten."""
    folder.mkdir(exist_ok=True)
    shutil.copy(module, folder)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    forget()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(module.stem, None)
        forget()


def pip_install(source: Path, target: Path) -> None:
    """Has pip install a package from its folder into another, offline."""
    done = run_python(target, "-m", "pip", "install", *FLAGS, "--target", target, source)
    assert done.returncode == 0, done.stderr


def run_python(
    installed: Path, *command: str | Path, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python where the packages of a folder are installed, and there unless `cwd` is given."""
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd or installed,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def answers(installed: Path, *commands: Sequence[str], cwd: Path | None = None) -> list[Answer]:
    """What `alignlab` says where the packages of a folder are installed, to each command."""
    done = run_python(installed, "-c", COMMANDS, json.dumps(commands), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [Answer(*answer) for answer in json.loads(done.stdout.splitlines()[-1])]
