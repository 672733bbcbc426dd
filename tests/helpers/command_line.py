"""The command `alignlab`, called in this process."""

from typer.testing import CliRunner, Result

from alignlab.cli import app


def alignlab(*arguments: object) -> Result:
    """Runs `alignlab` in a terminal in which every line has room."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})


def refused(*arguments: object) -> str:
    """The line that a command prints which is the user's mistake, and nothing else."""
    result = alignlab(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr
