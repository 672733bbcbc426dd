"""Whether a node trains with the same alignlab and torch as the process that sends it runs.

Runs of a comparison are only comparable if the same code trained them. A commit alone does not say
so: a checkout may hold changes, and an installed wheel knows no commit.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch

import alignlab
import alignlab.experiments
import alignlab.kernels
import alignlab.losses
from alignlab.environment import git_commit

ROOMS = {
    "alignlab": alignlab.__path__[0],
    "losses": alignlab.losses.__path__[0],
    "kernels": alignlab.kernels.__path__[0],
    "experiments": alignlab.experiments.__path__[0],
}


@cache
def code_facts() -> dict[str, str]:
    """Versions, commit, and a digest of every source file and shipped model."""
    digest = hashlib.sha256()
    for name, path in sorted(_files()):
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return {
        "alignlab": alignlab.__version__,
        "torch": torch.__version__,
        "files": digest.hexdigest()[:12],
        "commit": git_commit() or "unknown",
    }


def differing_code(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """What differs, in words; None if both train alike, from whatever commit.

    Args:
        here: `code_facts` of this process.
        there: those of the other one.
    """
    names = [name for name in here if here[name] != there.get(name)]
    if not names or names == ["commit"]:
        return None
    return "; ".join(f"{name} {here[name]} here, {there.get(name)} there" for name in names)


def _files() -> Iterator[tuple[str, Path]]:
    """Files by a name that is the same in a checkout and in an installed wheel."""
    for room, folder in ROOMS.items():
        root = Path(folder)
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            if room == "alignlab" and parts[0] in ROOMS:
                continue  # a wheel has the other rooms inside
            if path.is_file() and (path.suffix == ".py" or parts[0] == "assets"):
                yield "/".join((room, *parts)), path
