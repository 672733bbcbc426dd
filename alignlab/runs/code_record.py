"""Which code a run was trained with: `code.json` and the changes to its commit, `code.diff`.

`code.json` has an entry for each start of the training whose code was another than before: commit,
version, names of files that git does not know, versions of packages with plug-ins, and environment
variables that numbers depend on. The diff is that of tracked files of alignlab's own checkout, up
to `MOST_BYTES`; of files that git does not know, and of other packages, nothing but names is kept.
"""

import hashlib
import os
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypedDict

import alignlab
from alignlab.checkout import git
from alignlab.runs.atomic_files import write_bytes
from alignlab.runs.checksums import DamagedError, damaged_files, read_json, write_json

RECORD = "code.json"
MOST_BYTES = 1 << 20
MOST_NAMES = 200
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_INTERPRET",
)
"""Environment variables that numbers depend on."""
GROUPS = (
    *("alignlab.objectives", "alignlab.stage1", "alignlab.teachers"),
    *("alignlab.kernels", "alignlab.metrics", "alignlab.data"),
)
DIFF = (  # what `git apply` takes, whatever the user's settings say of diffs
    *("--binary", "--unified=3", "--no-ext-diff", "--no-textconv", "--no-color"),
    *("--submodule=short", "--src-prefix=a/", "--dst-prefix=b/"),
)
_FIX = "remove it: with which code the run was trained is then not known"


class Code(TypedDict):
    """The code of a process.

    Args:
        version: of alignlab.
        commit: of the checkout; None for an installed package.
        diff_bytes: size of its changes, also if they are not kept.
        diff_sha256: of the changes; empty without a checkout.
        untracked: names of files in the checkout that git does not know.
        plugins: versions of packages that register something, by name.
        variables: those of `VARIABLES` that are set.
    """

    version: str
    commit: str | None
    diff_bytes: int
    diff_sha256: str
    untracked: list[str]
    plugins: dict[str, str]
    variables: dict[str, str]


class Start(Code):
    """A start of a training.

    Args:
        step: steps that were done by then.
        diff: file in the run's folder; None without a checkout, or if it would be too large.
    """

    step: int
    diff: str | None


def record_code(folder: Path, *, step: int) -> None:
    """Records the code of this process, unless it is that of the start before.

    Args:
        folder: of the run; this process holds its lock.
        step: steps done.
    """
    starts = read_code(folder) if step else []
    diff = _diff()
    kept = None if diff is None or len(diff) > MOST_BYTES else diff
    name = "code.diff" if not starts else f"code-{len(starts) + 1}.diff"
    start: Start = {"step": step, "diff": None if kept is None else name, **_facts()}
    if starts and {**starts[-1], "step": step, "diff": start["diff"]} == start:
        return
    if kept is not None:
        write_bytes(folder / name, kept)
    write_json(folder / RECORD, {"starts": [*starts, start]})


def read_code(folder: Path) -> list[Start]:
    """The starts of a run, in order; none of an older version's run.

    Raises:
        DamagedError: the file is damaged.
    """
    path = folder / RECORD
    return list(read_json(path, fix=_FIX).get("starts", [])) if path.exists() else []


def check_diffs(folder: Path) -> None:
    """Refuses a kept diff that is not what was written.

    Raises:
        DamagedError: it names the file.
    """
    expected = {s["diff"]: s["diff_sha256"] for s in read_code(folder) if s["diff"] is not None}
    for name, problem in damaged_files(folder, expected).items():
        raise DamagedError(folder / name, problem, "copy it back from elsewhere")


@cache
def _diff() -> bytes | None:
    """Of the checkout, once a process: what is changed later was not imported."""
    return git("diff", *DIFF, "HEAD")


@cache
def _facts() -> Code:
    commit, untracked = git("rev-parse", "HEAD"), git("ls-files", "--others", "--exclude-standard")
    names = (untracked or b"").decode("utf-8", "replace").splitlines()
    points = [point for group in GROUPS for point in entry_points(group=group)]
    return {
        "version": alignlab.__version__,
        "commit": None if commit is None else commit.decode().strip(),
        "diff_bytes": len(_diff() or b""),
        "diff_sha256": "" if _diff() is None else hashlib.sha256(_diff() or b"").hexdigest(),
        "untracked": names[:MOST_NAMES],
        "plugins": {point.dist.name: point.dist.version for point in points if point.dist},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
