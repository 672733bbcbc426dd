"""The git checkout that alignlab was imported from, if it is one."""

import shutil
import subprocess
from pathlib import Path

import alignlab

FOLDER = Path(alignlab.__file__).resolve().parent.parent


def git(*arguments: str) -> bytes | None:
    """What git prints in the checkout; None without a checkout or git, or if it fails."""
    if not (FOLDER / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None
