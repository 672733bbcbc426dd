"""Passwords in URLs are in nothing that alignlab shows, sends or keeps in a report."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.config.run import RunConfig
from alignlab.environment import command_line, describe_environment
from alignlab.errors import UserError
from alignlab.errors import shown as quoted
from alignlab.experiments.compare.result import Comparison, RunResult
from alignlab.experiments.report.write import write_report
from alignlab.passwords import without_password
from alignlab.recipe import dump, load_run
from alignlab.runs.checksums import with_checksum_line
from alignlab.tracking.connection import Connection, _reason
from alignlab.tracking.mlflow_run import MlflowRun
from alignlab.tracking.names import mlflow_params, mlflow_tags
from made_comparisons import make_comparison

MakeConfig = Callable[..., RunConfig]
URLS = ("https://me:s3cr@et@host:5000/x", "postgresql://me:s3cr@et@host/db?password=s3cr")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://u:pw@h/db", "postgresql://u:***@h/db"),
        ("postgresql+psycopg://u:p/w@h:5432/db", "postgresql+psycopg://u:***@h:5432/db"),
        ("postgresql://u:p@w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p@w/x@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p?w#x@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p'w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p'@w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p@ w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://me@corp:pw@h/db", "postgresql://me@corp:***@h/db"),
        ("postgresql://:pw@h/db", "postgresql://:***@h/db"),
        ("postgresql://u:pw@[::1]:5432/db", "postgresql://u:***@[::1]:5432/db"),
        ("postgresql://h/db?user=u&password=s", "postgresql://h/db?user=u&password=***"),
        ("postgresql://h/db?password=s@x/y&user=u", "postgresql://h/db?password=***&user=u"),
        ("mysql://h/db?passwd=s#x", "mysql://h/db?passwd=***#x"),
        ("mssql://?odbc_connect=UID%3Du%3BPWD%3Ds%3BX%3D1", None),
        ("https://h/x?a=1&Access_Token=s", "https://h/x?a=1&Access_Token=***"),
        ("https://h/x?api_key=s&api-key=s&secret=s&sig=s&pwd=s", None),
        ("https://h/x?X-Amz-Signature=s&X-Amz-Security-Token=s", None),
        ("https://token@host/x", "https://***@host/x"),
        ("https://u:pw@host/x", "https://***@host/x"),
        ("HTTPS://token:@host/x", "HTTPS://***@host/x"),
        ("s3://key:a/b+c=@bucket/x", "s3://***@bucket/x"),
        ("a=https://t@h b=mysql://u:p@h/d", "a=https://***@h b=mysql://u:***@h/d"),
        ("[https://u:p@h,https://u:w@g]", "[https://***@h,https://***@g]"),
        ("API to 'https://u:p@h/api' failed", "API to 'https://***@h/api' failed"),
    ],
)
def test_a_password_goes(text: str, expected: str | None) -> None:
    shown = without_password(text)
    if expected is None:
        assert "***" in shown
        assert "=s" not in shown
        assert "Ds%" not in shown
    else:
        assert shown == expected
    assert without_password(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://host:5000/a/b?x=1#c",
        "http://[::1]:5000/x",
        "postgresql://me@host:5432/db?user=a@b.c&passfile=/x",
        "http://host:5000, then a@b.c",
        "https://host/x?tokenizer=t5",
        "sqlite:////tmp/a%2Fb %25? #c@d:e/study.db",
        "journal:///data/a@b:c/x.log",
        "name=a:b@c steps=2",
        "postgresql://..., mysql://...",
    ],
)
def test_what_holds_no_password_stays(text: str) -> None:
    assert without_password(text) == text


def test_the_command_is_kept_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", "tiny", f"tracking.mlflow={URLS[0]}", f"storage={URLS[1]}"]
    monkeypatch.setattr(sys, "argv", ["/bin/alignlab", *arguments])
    expected = (
        "alignlab train tiny tracking.mlflow=https://***@host:5000/x "
        "storage=postgresql://me:***@host/db?password=***"
    )
    assert describe_environment()["command"] == expected == command_line("alignlab")


class _Client:
    """Takes the files that MLflow would."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def log_artifact(self, run_id: str, path: str, folder: str | None = None) -> None:
        self.texts[Path(path).name] = Path(path).read_text()

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self.texts[name] = text


def test_mlflow_gets_no_password(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(f"tracking.mlflow={URLS[0]}")
    recipe, result = tmp_path / "recipe.yaml", tmp_path / "result.json"
    stored = with_checksum_line(dump(config))
    recipe.write_text(stored)
    result.write_text("{}")
    client = _Client()
    run = MlflowRun(tmp_path, Connection("sqlite:///x"), experiment="x", name="x", tags={})
    run.upload(client, (recipe, result, tmp_path / "none.yaml"))

    assert mlflow_params(config)["tracking.mlflow"] == "https://***@host:5000/x"
    assert mlflow_tags({"alignlab.command": f"a {URLS[0]}"}) == {
        "alignlab.command": "a https://***@host:5000/x"
    }
    assert {*client.texts} == {"recipe.yaml", "result.json"}
    assert "s3cr" not in client.texts["recipe.yaml"]
    assert recipe.read_text() == stored  # a resume reads it
    recipe.write_text(client.texts["recipe.yaml"])
    assert load_run(recipe, [f"tracking.mlflow={URLS[0]}"]) == config


def test_a_report_has_no_password(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "recipe": f"name: x\ntracking:\n  mlflow: {URLS[0]}\nstorage: '{URLS[1]}'\n",
        "command": f"alignlab compare x tracking.mlflow={URLS[0]} storage={URLS[1]}",
        "environment": {"command": f"alignlab train {URLS[1]}"},
        "differing": {"data.url": {"none": URLS[0]}},
    }
    run = RunResult("none", 0, 1, "none/0", {}, {})
    comparison = make_comparison([run], **fields)
    write_report(comparison, tmp_path)
    comparison.save(tmp_path / "comparison.json")
    texts = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}

    assert {"report.html", "report.md", "table.csv", "table.tex", "comparison.json"} <= {*texts}
    assert [name for name, text in texts.items() if "s3cr" in text] == []
    assert "host:5000/x" in texts["report.md"]
    assert "host:5000/x" in texts["report.html"]

    plain = texts["comparison.json"].replace("https://***@", "https://me:s3cr@")
    (tmp_path / "comparison.json").write_text(plain)  # as older versions wrote it
    assert Comparison.load(tmp_path / "comparison.json") == comparison


def test_messages_and_printed_recipes_have_no_password() -> None:
    assert str(UserError(f"storage: {URLS[1]}: no")).startswith("storage: postgresql://me:***@host")
    assert "s3cr" not in quoted(f"https://me:s3cr{'e' * 90}@host")  # cut before its @
    assert "s3cr" not in _reason(OSError(f"API request to {URLS[0]} failed"))
    arguments = ["train", "tiny", f"tracking.mlflow={URLS[0]}", "--print-config"]
    printed = CliRunner().invoke(app, arguments)
    assert printed.exit_code == 0
    assert "mlflow: https://***@host:5000/x" in printed.output
