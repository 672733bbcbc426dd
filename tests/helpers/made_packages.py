"""Packages that are installed: as far as this process's entry points can tell, or by pip."""

import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from typer.testing import CliRunner

from alignlab.evaluation.own_metrics import installed_metrics
from alignlab.kernels.registry import installed_kernels

MOST_S = 600  # that `anew` may take
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
UNSHOWN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


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

    def ask() -> list[tuple[int, str, str]]:
        app = importlib.import_module("alignlab.cli").app
        done = [CliRunner().invoke(app, words) for words in commands]
        return [(each.exit_code, each.stdout, each.stderr) for each in done]

    return [Answer(*answer) for answer in anew(installed, ask, cwd)]


def anew(installed: Path, work: Callable[[], Any], cwd: Path | None = None) -> Any:
    """What `work` gives, as JSON has it, in a process where nobody has imported alignlab yet.

    It is forked, and imports torch and the like no second time, which would take seconds.

    Args:
        installed: folder of packages, which are installed in that process.
        work: imports what it needs.
        cwd: where it works; default: `installed`.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        done: dict[str, Any] = {}
        try:
            signal.alarm(MOST_S)  # which kills it: a hang fails the test
            os.close(reading)
            _begin_anew(installed, cwd or installed)
            done["result"] = work()
        except BaseException:
            done["error"] = traceback.format_exc()
        with os.fdopen(writing, "w") as pipe:
            json.dump(done, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"ended with {os.waitstatus_to_exitcode(status)}"
    done = json.loads(text)
    assert "error" not in done, done["error"]
    return done["result"]


def _begin_anew(installed: Path, folder: Path) -> None:
    """Makes a forked process one in which nobody has imported alignlab, or any of its packages."""
    os.chdir(folder)
    sys.path.insert(0, str(installed))
    os.environ["COLUMNS"] = "200"
    torch.set_num_threads(1)
    warnings.resetwarnings()  # in a test they are errors
    for category in UNSHOWN:
        warnings.simplefilter("ignore", category)
    logging.getLogger("alignlab").handlers.clear()  # those of other commands
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        is_others = "site-packages" in file or file.startswith(sys.base_prefix)
        if (file and not is_others) or name.split(".")[0] == "alignlab":
            del sys.modules[name]
    importlib.invalidate_caches()
