"""Follows a page of the docs to the letter in an empty folder, with packages that it installs."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FLAGS = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
# A process that imports alignlab takes seconds: one runs all of its commands.
COMMANDS = """
import json, sys
from typer.testing import CliRunner
from alignlab.cli import app
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, words)
    print(" ".join(words), done.output)
    assert done.exit_code == 0, (words, done.output, done.exception)
"""


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: (name, content), the name from a line such as `` `a.py`: ``."""
    return re.findall(r"^(?:`([\w.-]+)`:\n\n)?```\w+\n(.*?)```", text, flags=re.M | re.S)


def run_python(folder: Path, *words: str) -> str:
    """Runs Python in a folder, with what `install` put there; gives what it prints."""
    paths = [str(folder / "installed"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_commands(folder: Path, commands: Sequence[str], shorter: Mapping[str, str]) -> str:
    """Runs lines of a page, each with what `shorter` adds by its first two words; what they say."""
    words = [shlex.split(command, comments=True)[1:] for command in commands]
    words = [[*line, *shlex.split(shorter.get(" ".join(line[:2]), ""))] for line in words]
    return run_python(folder, "-c", COMMANDS, json.dumps(words))


def install(folder: Path) -> None:
    """Installs the package in a folder, into a folder of its own there, from no index."""
    run_python(folder, "-m", "pip", "install", "--quiet", *FLAGS, "--target", "installed", ".")
