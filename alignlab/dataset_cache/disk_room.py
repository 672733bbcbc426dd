"""How much of a disk the cache may take: checkpoints, which nothing makes again, need the rest.

Sizes are told in powers of 1000, as disks are sold; what is left free counts in GiB.
"""

import shutil
from pathlib import Path

from alignlab.units import GIB

SHARE, AT_MOST, AT_LEAST = 0.05, 50 * GIB, GIB


def reserve(total: int) -> float:
    """Bytes of a disk of `total` that the cache leaves free: 5 %, from 1 to 50 GiB."""
    return max(AT_LEAST, min(SHARE * total, AT_MOST))


def check_room(folder: Path, size: int) -> None:
    """Refuses `size` bytes more in a folder, which may not be there yet.

    Raises:
        OSError: they would not leave the reserve free; or the disk does not answer.
    """
    free, kept = disk_room(folder)
    if size > free - kept:
        raise OSError(
            f"{free / GIB:.1f} GiB of its disk are free, of which {kept / GIB:.1f} are left to "
            "checkpoints"
        )


def disk_room(folder: Path) -> tuple[float, float]:
    """Bytes that are free where a folder is or will be, and those of them that are kept free."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    disk = shutil.disk_usage(there)
    if not disk.total:  # as filesystems of object stores say that have no limit
        return float("inf"), 0.0
    return disk.free, reserve(disk.total)


def size_text(size: float) -> str:
    """Bytes as people read them, three digits: `8.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # which `.3g` would write as 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"
