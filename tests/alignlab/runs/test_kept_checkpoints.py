"""What is left of a finished run's checkpoints, and what can be done with it."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import alignlab.train as train_module
from alignlab.errors import UserError
from alignlab.evaluation.evaluate_run import evaluate_run
from alignlab.export import export
from alignlab.plan.sizes import num_kept
from alignlab.recipe import load_run
from alignlab.runs.checkpoint_folders import (
    has_optimizer,
    hold,
    problem,
    reading,
    step_folders,
    weight_copies,
)
from alignlab.runs.kept_checkpoints import keep_weights_of
from alignlab.runs.open_folder import open_folder
from alignlab.runs.verify import verify_run
from alignlab.sampling import sample_to_file
from alignlab.train import train
from alignlab.training.checkpoint import ModelChoice
from damage import flip
from kills import Killed
from run_contents import file_contents, timeless_metrics
from tiny_runs import MakeConfig

pytestmark = pytest.mark.usefixtures("shared_clips")

SMALL = ("eval.clips=1", "checkpoint.every=1", "optim.batch_size=1", "optim.ema=0.9")


def kept(run: Path) -> list[str]:
    return [path.name for path in step_folders(run / "checkpoints")]


def test_weights_are_kept_without_the_optimizer(make_config: MakeConfig, tmp_path: Path) -> None:
    """They can be exported; the run cannot be prolonged. No number changes."""
    run = train(make_config(*SMALL))
    assert kept(run) == ["step-000001", "step-000002"]
    before = file_contents(run / "checkpoints" / "step-000002")
    metrics = timeless_metrics(run)
    slim = ("checkpoint.keep_finished=weights",)
    assert train(make_config(*SMALL, *slim)) == run
    assert kept(run) == ["step-000002"]
    (checkpoint,) = step_folders(run / "checkpoints")
    found = file_contents(checkpoint)
    assert before.keys() - found.keys() == {"optimizer.safetensors"}
    assert all(found[name] == before[name] for name in found if name.endswith("safetensors"))
    assert "ema.safetensors" in found and "objectives.safetensors" in found
    assert problem(checkpoint) is None and timeless_metrics(run) == metrics
    assert (export(run, tmp_path / "out") / "model_index.json").exists()
    with pytest.raises(UserError, match="step-000002 holds weights only"):
        train(make_config(*SMALL, *slim, "steps=3"))
    assert json.loads((run / "result.json").read_text())["steps"] == 2


def test_steps_that_are_named_are_kept_besides_the_newest(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """By `keep_every`, while the run trains and of the finished one."""
    every = (*SMALL, "steps=5", "checkpoint.keep=1", "checkpoint.keep_every=2")
    run = train(make_config(*every))
    assert kept(run) == ["step-000002", "step-000004", "step-000005"]
    config = make_config(*every, "checkpoint.keep_finished=weights")
    assert [num_kept(config, newest) for newest in (1, 2)] == [3, 3]
    train(config)
    assert kept(run) == ["step-000002", "step-000004", "step-000005"]
    assert not any(has_optimizer(folder) for folder in step_folders(run / "checkpoints"))
    export(run, tmp_path / "out", ModelChoice(step=2))
    line = "checkpoint.keep_every: 3 is no multiple of every, 2"
    with pytest.raises(UserError, match=line):
        make_config("checkpoint.every=2", "checkpoint.keep_every=3")


def test_copies_of_weights_stay_and_are_read(make_config: MakeConfig, tmp_path: Path) -> None:
    """Of steps with a checkpoint and of others; no optimizer is in them, and none is resumed."""
    every = ("checkpoint.every=4", "checkpoint.keep=1", "checkpoint.weights_every=2")
    run = train(make_config(*SMALL, "steps=5", *every))
    checkpoints, out = run / "checkpoints", tmp_path / "out"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["step-000005", "weights-000002", "weights-000004"]
    for step in (2, 4):
        copy = checkpoints / f"weights-{step:06d}"
        assert problem(copy) is None and not has_optimizer(copy)
        assert {"transformer", "ema.safetensors", "objectives.safetensors"} <= set(os.listdir(copy))
        export(run, out / str(step), ModelChoice(step=step, ema=False))
        (stored,) = (copy / "transformer").glob("*.safetensors")
        (written,) = (out / str(step) / "transformer").glob("*.safetensors")
        assert written.read_bytes() == stored.read_bytes()
    assert evaluate_run(run, choice=ModelChoice(step=2), generation=False).step == 2
    assert not verify_run(run).damaged
    flip(checkpoints / "weights-000004" / "ema.safetensors")
    (line,) = verify_run(run).damaged.values()
    assert "weights-000004 is damaged (ema.safetensors: its checksum is another)" in line
    with pytest.raises(UserError, match="weights-000004 is damaged"):
        export(run, out / "damaged", ModelChoice(step=4))
    train(make_config(*SMALL, *every, "steps=5", "checkpoint.keep_finished=none"))
    assert not list(checkpoints.iterdir())


def test_a_copy_of_the_weights_of_a_step_that_comes_again_goes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(*SMALL, "steps=3", "checkpoint.every=9", "checkpoint.weights_every=1")

    def dying(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_module.RunTrainer, "finish", dying)
        train(config)
    run = Path(config.output) / config.name
    copies = [path.name for path in weight_copies(run / "checkpoints")]
    assert copies == ["weights-000001", "weights-000002", "weights-000003"]
    # a kill between a checkpoint and its copy
    copy, checkpoint = (run / "checkpoints" / name for name in (copies[-1], "step-000003"))
    shutil.rmtree(copy)
    open_folder(config, ExitStack(), wait=False)
    assert problem(copy) is None
    # of a checkpoint without checksums, as an older alignlab wrote it, all the same
    written = sorted(os.listdir(copy))
    shutil.rmtree(copy)
    shutil.copyfile(checkpoint / "checksums.json", run / "aside")
    (checkpoint / "checksums.json").unlink()
    keep_weights_of(checkpoint)
    assert sorted(os.listdir(copy)) == written and problem(copy) is None
    shutil.copyfile(run / "aside", checkpoint / "checksums.json")
    flip(copy / "ema.safetensors")
    assert problem(checkpoint) is None
    shutil.rmtree(checkpoint)
    # whoever reads it finds it whole to the end
    waited: list[float] = []
    with ExitStack() as reader, monkeypatch.context() as patch:
        assert reader.enter_context(hold(copy))

        def read(seconds: float) -> None:
            assert copy.is_dir() and len(waited) < 2
            waited.append(seconds)
            if len(waited) == 2:
                reader.close()

        patch.setattr(time, "sleep", read)
        with caplog.at_level(logging.INFO):
            open_folder(config, ExitStack(), wait=False)
    said = [r.getMessage() for r in caplog.records if "waiting for" in r.getMessage()]
    assert said == [f"waiting for the command that reads {copy}, which is written again"]
    assert len(waited) == 2 and not weight_copies(run / "checkpoints")


def test_nothing_is_kept_and_that_is_said(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A kill after the result and before the drop is made up for by the same command."""
    config = make_config(*SMALL, "checkpoint.keep_finished=none")

    def dying(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_module, "drop_checkpoints", dying)
        train(config)
    run = tmp_path / "run"
    assert (run / "result.json").exists() and kept(run) == ["step-000001", "step-000002"]
    assert train(config) == run
    assert kept(run) == []
    uses: list[Callable[[], object]] = [
        lambda: export(run, tmp_path / "out"),
        lambda: sample_to_file(run, "a square", (), tmp_path / "a.mp4"),
        lambda: train(make_config(*SMALL, "steps=3")),
    ]
    for use in uses:
        with pytest.raises(UserError, match="its checkpoints were dropped") as error:
            use()
        assert "(checkpoint.keep_finished)" in str(error.value)
    assert train(config) == run  # is finished all the same


@pytest.mark.parametrize("keep", ["weights", "none"])
def test_what_is_read_is_kept_for_now(
    keep: str, full_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    settings = [f"output={tmp_path}", f"checkpoint.keep_finished={keep}"]
    config = load_run(run / "recipe.yaml", settings, stored=True)
    before = file_contents(run / "checkpoints")
    with reading(run / "checkpoints"):
        train(config)
        assert file_contents(run / "checkpoints") == before
    assert "step-000002 is being read: it is kept for now" in caplog.text
    train(config)
    assert file_contents(run / "checkpoints") != before


def test_a_finished_run_of_more_than_it_keeps_is_left(full_run: Path, tmp_path: Path) -> None:
    """`all`, the default, drops nothing."""
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    train(load_run(run / "recipe.yaml", [f"output={tmp_path}"], stored=True))
    assert file_contents(run / "checkpoints") == file_contents(full_run / "checkpoints")
