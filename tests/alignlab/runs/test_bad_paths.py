"""Paths that cannot be written: one line with path and reason, before any work."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from alignlab.config.written_names import refuse_written
from alignlab.data.video import write_mp4
from alignlab.runs import out_paths
from command_line import alignlab, refused

BAD = {
    "file": "is a file",
    "file/deep": "is a file, so",
    "nothing": "is a link to nothing",
    "nothing/deep": "is a link to nothing",
    "loop": "Too many levels of symbolic links",
    "x" * 300: "File name too long",
    "/proc/x": "/proc cannot be written to",
    "/sys/x": "/sys cannot be written to",
    "readonly/x": "readonly cannot be written to (Read-only file system)",
}
FROM_RECIPE = (
    ("train", "tiny"),
    ("stage1", "moalign", "stage1_moalign"),
    ("demo",),
    ("sweep", "sweep_refalign"),
)
WITH_OUT = (
    ("sample", "run", "--prompt", "x", "--out", ".mp4"),
    ("evaluate", "run", "--out", ".json"),
    ("export", "run", "--out", ""),
    ("probe", "run", "--out", ""),
    ("data", "preview", "tiny", "--out", ""),
    ("teachers", "score", "tiny", "--out", ".csv"),
    ("bench", "overhead", "--out", ".json"),
    ("bench", "share", "--out", ".json"),
    ("bench", "kernels", "--out", ""),
    ("assets", "build", "--out", ""),
)


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone" / "deep")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "readonly").mkdir()
    temporary = tempfile.TemporaryFile

    def refusing(*arguments: Any, **settings: Any) -> Any:
        if settings.get("dir") == tmp_path / "readonly":  # root writes where the rights forbid it
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return temporary(*arguments, **settings)

    monkeypatch.setattr(tempfile, "TemporaryFile", refusing)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def places(odd: Path) -> set[str]:
    return {path.relative_to(odd).as_posix() for path in odd.rglob("*")}


@pytest.mark.parametrize("name", BAD)
def test_an_output_that_cannot_be_written_is_refused(name: str, odd: Path) -> None:
    before = places(odd)
    for command in FROM_RECIPE if name in ("file/deep", "/proc/x") else FROM_RECIPE[:1]:
        line = refused(*command, f"output={odd / name}")
        assert line.startswith("error: output: ") and BAD[name] in line
    assert places(odd) == before


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", WITH_OUT, ids=lambda command: " ".join(command[:2]))
def test_an_out_that_cannot_be_written_is_refused(
    command: tuple[str, ...], name: str, odd: Path
) -> None:
    before = places(odd)
    *words, suffix = command
    inner = f"{name}/x" if suffix and name in ("file", "loop", "nothing") else name
    line = refused(*words, f"{odd / inner}{suffix}")
    assert line.startswith("error: --out: ") and BAD[name] in line
    assert places(odd) == before


@pytest.mark.parametrize("command", ["evaluate", "export", "probe"])
def test_a_run_that_cannot_be_written_is_named_with_what_helps(
    command: str, full_run: Path, odd: Path
) -> None:
    """It is not blamed on an `--out` that nobody gave."""
    run = odd / "readonly"
    shutil.copytree(full_run, run, dirs_exist_ok=True)
    line = refused(command, run)
    assert line == (
        f"error: {run} cannot be written to (Read-only file system): name another place with "
        "--out\n"
    )


@pytest.mark.parametrize("output", ["", "  "])
def test_an_output_without_a_name_is_refused(output: str) -> None:
    for command in FROM_RECIPE:
        assert "names no folder" in refused(*command, f"output={output!r}")


@pytest.mark.parametrize(
    "name",
    [
        *("mlflow.db", "mlflow.db.lock", "mlartifacts", "study.db", "x/recipe.yaml", "x/stage1"),
        *(
            "x/checkpoints/y",
            "report.html",
            "x/worker-3.log",
            ".checked_media.json",
            "mlartifacts/x",
        ),
    ],
)
def test_a_name_that_alignlab_writes_itself_is_refused(name: str) -> None:
    for command in FROM_RECIPE if name == "mlflow.db" else FROM_RECIPE[:1]:
        assert "alignlab" in refused(*command, f"name={name}")


def test_a_variant_named_as_a_file_is_refused() -> None:
    assert "alignlab writes a file 'report.md'" in refused("demo", "variants={report.md: {}}")


def test_what_a_run_writes_is_known(full_run: Path) -> None:
    for path in full_run.iterdir():
        with pytest.raises(ValueError, match="alignlab"):
            refuse_written(f"x/{path.name}")


@pytest.mark.parametrize("name", ["stage1", "probe", "a/b", "pair/export/seed-0", "v1.2", "mlflow"])
def test_other_names_are_let_through(name: str) -> None:
    refuse_written(name)


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Limits the size of files, as a full disk does: only part of a file is written."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_video_that_does_not_fit_leaves_nothing(
    limited: Callable[[int], None], tmp_path: Path
) -> None:
    import torch

    path = tmp_path / "clip.mp4"
    path.write_text("old")
    limited(500)
    with pytest.raises(OSError, match="File too large") as error:
        write_mp4(path, torch.zeros(5, 32, 32, 3, dtype=torch.uint8), 8)
    assert error.value.filename == str(path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("command", "where"),
    [
        (("data", "preview", "tiny", "--clips", "1", "--out", "out"), "out/sheet.png"),
        (("export", "RUN", "--out", "out"), "out"),
        (("train", "RECIPE", "output=out"), "out/run/recipe.yaml"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(
    command: tuple[str, ...],
    where: str,
    full_run: Path,
    recipe_file: Path,
    limited: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"RUN": full_run, "RECIPE": recipe_file}
    words = [str(paths.get(word, word)) for word in command]
    before = set(full_run.rglob("*"))
    limited(300)
    result = alignlab(*words)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {where}: File too large")
    assert "Traceback" not in result.output
    left = (
        [path for path in Path("out").rglob("*") if path.is_file()] if Path("out").exists() else []
    )
    assert {path.name for path in left} <= {".writer.lock", ".checked_media.lock"}
    assert set(full_run.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (ConnectionError("the hub is away\nmore"), "the hub is away"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "the disk is full (a/b): "),
        (OSError(errno.ENOSPC, "", "a"), "the disk is full (a): free some space (or files, where "),
    ],
)
def test_an_error_of_the_machine_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: object) -> NoReturn:
        raise error

    monkeypatch.setattr("alignlab.train.train", broken)
    result = alignlab("train", "tiny")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {line}") and result.stderr.count("\n") == 1


def test_one_command_writes_a_path_at_a_time(full_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out_paths.out_folder(out):
        for words in (("export", full_run), ("probe", full_run), ("data", "preview", "tiny")):
            assert "another process writes" in refused(*words, "--out", out)
    with out_paths.out_file(out / "x.mp4", ".mp4"):
        line = refused("sample", full_run, "--prompt", "x", "--out", out / "x.mp4")
    assert "another process writes" in line
    assert "no run there" in refused("export", tmp_path / "no" / "run")
    assert list(tmp_path.rglob("*")) == [], "neither locks nor empty folders stay"
