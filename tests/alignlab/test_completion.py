"""Tab in a shell: the script of `--show-completion`, and that `--install-completion` works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignlab.cli_options import complete_recipe

BASH = shutil.which("bash")


@pytest.fixture
def bash(tmp_path: Path) -> "Bash":
    if BASH is None:
        pytest.skip("no bash is installed")
    return Bash(tmp_path)


class Bash:
    """A bash with a home folder of its own that has `alignlab` on its path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = folder / "bin/alignlab"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m alignlab "$@"\n')
        program.chmod(0o755)
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = os.environ | {"HOME": str(folder), "PATH": path}

    def __call__(self, script: str) -> list[str]:
        done = subprocess.run(
            [str(BASH), "--norc", "-c", script],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def tab(self, *words: str) -> list[str]:
        """What is offered after these words, the last of which is not whole."""
        line = " ".join(f"'{word}'" for word in words)
        return self(
            f"source completion; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}\n"
            '_alignlab_completion alignlab; printf "%s\\n" "${COMPREPLY[@]}"'
        )


def test_bash_completes_commands_options_and_recipes(bash: Bash) -> None:
    (bash.folder / "control-of-mine.yaml").touch()
    bash("alignlab --show-completion > completion; test -s completion")
    assert bash.tab("alignlab", "comp") == ["compare"]
    assert "--list-runs" in bash.tab("alignlab", "compare", "--l")
    assert bash.tab("alignlab", "compare", "contr") == ["control", "control-of-mine.yaml"]


def test_installing_adds_a_line_to_the_shells_configuration(bash: Bash) -> None:
    told = bash("alignlab --install-completion; true")
    assert any("bash completion installed" in line for line in told)
    assert "alignlab" in (bash.folder / ".bashrc").read_text()
    assert list((bash.folder / ".bash_completions").iterdir())


def test_a_recipe_is_a_shipped_one_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("mine/one.yaml", "mine/two.yml", "mine/notes.txt", "tiny-one.yaml"):
        (tmp_path / name).touch()
    assert complete_recipe("mine/") == ["mine/one.yaml", "mine/two.yml"]
    assert complete_recipe("mine/o") == ["mine/one.yaml"]
    assert complete_recipe(f"{tmp_path}/mine/t") == [f"{tmp_path}/mine/two.yml"]
    assert complete_recipe("tiny") == [
        "tiny",
        *(f"tiny_dino/{name}" for name in TINY_DINO),
        "tiny-one.yaml",
    ]
    assert complete_recipe("none/") == [] and complete_recipe("~nobody-of-that-name/") == []


TINY_DINO = (
    "confirmed",
    "few_clips",
    "gradients",
    "label_free",
    "latents",
    "learning_rate",
    "more_tokens",
    "more_tokens_confirmed",
    "objective",
)
