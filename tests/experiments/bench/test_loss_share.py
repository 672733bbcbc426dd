"""The share of the alignment loss in a training step, on a transformer small enough for a CPU."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.experiments.bench.loss_share import SIZES, measure_share


def test_every_side_is_timed_and_the_plain_step_has_no_share() -> None:
    shares = measure_share(
        SIZES["smoke"], ["eager", "chunked"], references=2, steps=2, device=torch.device("cpu")
    )
    assert [share.side for share in shares] == ["none", "eager", "chunked"]
    assert shares[0].share == 0 and all(share.step_s > 0 for share in shares)
    assert len({share.parameters for share in shares}) == 1


def test_an_implementation_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="impl='triton' cannot run"):
        measure_share(SIZES["smoke"], ["triton"], steps=1, device=torch.device("cpu"))


def test_the_command_prints_and_keeps_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "share.json"
    command = ["bench", "share", "--size", "smoke", "--steps", "1", "--impl", "chunked"]
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert re.search(r"^chunked: [\d.]+ s per step, loss -?[\d.]+% of it$", result.output, re.M)
    kept = json.loads(out.read_text())
    assert kept["size"] == "smoke" and kept["environment"]["torch"]
    assert [side["side"] for side in kept["sides"]] == ["none", "chunked"]
