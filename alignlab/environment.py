"""Where a run happened: versions, commit, hardware."""

import logging
import platform
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import alignlab
from alignlab.checkout import git
from alignlab.kernels import speed_table
from alignlab.kernels.plugins import packages_with_kernels
from alignlab.passwords import without_password
from alignlab.runs.atomic_files import remove_folder
from alignlab.runs.checksums import DamagedError, read_json
from alignlab.runs.file_digests import cache_folder

log = logging.getLogger(__name__)

CHANGE_BITS = ("device", "threads", "processes", "torch", "kernels", "kernel_packages")
THEN = ", then "
UNKNOWN = "unknown"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "triton", "safetensors")
"""Those that numbers depend on."""


def describe_environment() -> dict[str, str]:
    """Facts that a number depends on, for `environment.json` and the report.

    `kernels` is there on a GPU only: what `impl: auto` goes by (`alignlab.kernels.speed_table`).
    `kernel_packages` is there if other packages register kernels.
    """
    cuda = torch.cuda.is_available()
    facts = {
        "alignlab": alignlab.__version__,
        "commit": git_commit() or "not a git checkout",
        "command": command_line(Path(sys.argv[0]).name),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": str(torch.get_num_threads()),
    }
    if cuda:
        use_own_kernel_rows()
        facts["kernels"] = str(speed_table.table_of(facts["device"]))
    packages = [f"{name} {package_version(name)}" for name in packages_with_kernels()]
    if packages:
        facts["kernel_packages"] = ", ".join(packages)
    return facts | _versions()


@cache
def _versions() -> dict[str, str]:
    """Those of `PACKAGES`, which this process has imported and no other can replace."""
    return {name: package_version(name) or "not installed" for name in PACKAGES}


def own_kernel_rows() -> Path:
    """Where `alignlab bench kernels --install` keeps what it measured on this machine."""
    return cache_folder() / "kernels.csv"


def use_own_kernel_rows() -> None:
    """Makes `impl: auto` go by what was measured on this machine, if anything was."""
    speed_table.use_rows(own_kernel_rows())


def command_line(program: str) -> str:
    """The arguments of this process behind the name of its program, without passwords in URLs."""
    return " ".join([program, *map(without_password, sys.argv[1:])])


def continued(earlier: Path, now: Mapping[str, str]) -> dict[str, str]:
    """Facts of a run that is resumed from a checkpoint, and a warning if anything changed.

    On another device, with other threads, another number of processes, another torch or, on a GPU,
    other kernels, sums are taken in another order: the run then ends with other last bits than
    uninterrupted. Such a fact is given as `1, then 2`.

    Args:
        earlier: the run's `environment.json`, if there is one; of a damaged one every such fact
            is `unknown`, and that is said.
        now: the facts of this process.
    """
    before: dict[str, str] = {}
    try:
        before = read_environment(earlier) if earlier.exists() else {}
    except DamagedError as error:
        log.warning("%s (%s): %s", earlier, error.problem, "it is damaged and written anew")
        before = dict.fromkeys(CHANGE_BITS, UNKNOWN)
        if earlier.is_dir():
            remove_folder(earlier)
    if before:
        before = {"processes": "1"} | before  # older runs had one process and do not say so
        if before.get("device", "cpu") != "cpu":
            # what `impl: auto` went by before it was measured
            before = {"kernels": str(speed_table.SpeedTable({}))} | before
    facts = dict(now)
    for name in (name for name in CHANGE_BITS if name in before and name in now):
        facts[name] = before[name]
        if (last := before[name].split(THEN)[-1]) != now[name]:
            facts[name] += THEN + now[name]
            log.warning(
                "%s: resumed with %s %s, after %s: the last bits of its numbers depend on it",
                earlier.parent,
                name,
                now[name],
                last,
            )
    return facts


def read_environment(path: Path) -> dict[str, str]:
    """The facts in a run's `environment.json`.

    Raises:
        DamagedError: it does not hold what was written.
    """
    fix = "copy it back from elsewhere, or train the run again"
    facts = read_json(path, fix=fix)
    if not all(isinstance(value, str) for value in facts.values()) or "torch" not in facts:
        raise DamagedError(path, "it does not hold the facts of a run", fix)
    return facts


def processor_name() -> str:
    """Model of the CPU as Linux calls it, or "CPU"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else "CPU"


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Short commit of the alignlab checkout, with `-dirty` for uncommitted changes; else None."""
    described = git("describe", "--always", "--dirty", "--abbrev=9")
    return (described or b"").decode().strip() or None
