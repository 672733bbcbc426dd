"""A run whose validation loss ends far above its start says so."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config.run import RunConfig
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.errors import UserError
from alignlab.evaluation.run_warnings import (
    START_FLOW,
    divergence_warnings,
    nonfinite_warnings,
)
from alignlab.runs.metric_rows import read_rows
from alignlab.sampling import sample_latents
from alignlab.train import train
from alignlab.training.setup import build_run, check_teachers_and_eval

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def test_a_run_that_diverges_is_told(make_config: MakeConfig) -> None:
    config = make_config("optim.lr=1", "eval.clips=4")
    found = result(train(config))
    assert found["diverged"] is True
    (text,) = found["notes"]
    assert text.startswith(
        "DIVERGED: the validation flow loss ended at more than 2 times its start"
    )
    start = read_rows(Path(config.output) / "run/metrics.jsonl")[0][START_FLOW]
    assert text.endswith(f" from {start:.3g}]")


def test_a_run_that_learns_is_not(make_config: MakeConfig) -> None:
    config = make_config("steps=4", "optim.lr=1e-3", "optim.ema=0.5")
    found = result(train(config))
    assert found["diverged"] is False and found["notes"] == []


def test_the_start_is_the_validation_loss_of_the_untrained_model(make_config: MakeConfig) -> None:
    config = make_config("optim.lr=1e-12")
    found = result(train(config))
    start = read_rows(Path(config.output) / "run/metrics.jsonl")[0][START_FLOW]
    assert start == pytest.approx(found["metrics"]["val/flow"], rel=1e-5)


def test_where_it_begins() -> None:
    rows = [{"step": 0.0, START_FLOW: 0.5}, {"step": 1.0}]
    assert divergence_warnings(rows, 1.0) == []
    (text,) = divergence_warnings(rows, 1.01)
    assert text.endswith("[1.01 from 0.5]")
    assert divergence_warnings([{"step": 0.0}], 1e9) == []  # of an older version


def test_metrics_that_are_not_finite_are_told() -> None:
    assert nonfinite_warnings({"a": 1.0, "b": 0.0}) == []
    (text,) = nonfinite_warnings({"a": math.nan, "b": 1.0, "c": math.inf})
    assert text == "not finite, and so in no mean or test: a, c"


def test_clips_that_are_not_finite_are_never_written(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **settings: object) -> torch.Tensor:
        latents: torch.Tensor = sample_latents(*args, **settings)  # type: ignore[arg-type]
        return latents * torch.inf

    monkeypatch.setattr("alignlab.evaluation.generation.sample_latents", broken)
    config = make_config("eval.sample_clips=1")
    with pytest.raises(UserError, match="the latents of a generated clip are not finite"):
        train(config)
    assert not list(Path(config.output).rglob("*.mp4"))


def test_fewer_val_clips_than_asked_for_are_told(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ShapesDataset, "__len__", lambda dataset: 1)
    check_teachers_and_eval(build_run(make_config("eval.clips=2")))
    assert "eval.clips: 2, but the val split has 1; those are taken" in caplog.messages
