"""Where a run happened: versions, commit, hardware."""

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import alignlab

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "triton", "safetensors")


def describe_environment() -> dict[str, str]:
    """Facts that a number depends on, for `environment.json` and the report."""
    cuda = torch.cuda.is_available()
    facts = {
        "alignlab": alignlab.__version__,
        "commit": git_commit() or "not a git checkout",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": str(torch.get_num_threads()),
    }
    return facts | {name: package_version(name) or "not installed" for name in PACKAGES}


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
    folder = Path(alignlab.__file__).resolve().parent.parent
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=9"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return shown.stdout.strip() or None
