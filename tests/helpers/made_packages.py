"""Packages that are installed as far as Python's entry points can tell."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignlab.kernels.registry import installed_kernels

TINY_KERNEL = Path(__file__).parents[1] / "kernels" / "external" / "tiny_kernel.py"


def write_package(folder: Path, package: str, group: str, **entries: str) -> None:
    """Writes what an installer would leave of a package that registers `entries` in a group."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
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
    folder.mkdir(exist_ok=True)
    shutil.copy(TINY_KERNEL, folder)
    write_package(folder, package, "alignlab.kernels", **entries)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    installed_kernels.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("tiny_kernel", None)
        installed_kernels.cache_clear()
