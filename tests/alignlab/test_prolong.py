"""A prolonged run is the one that was planned for as many steps from the start: bitwise."""

import json
import logging
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.runs import prolong
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.train import train
from kills import Killed
from run_contents import timeless_metrics, timeless_rows
from tiny_runs import MakeConfig, TrainUntil

pytestmark = pytest.mark.usefixtures("shared_clips")

SMALL = ("eval.clips=1", "tracking.log_every=2", "checkpoint.every=2", "optim.batch_size=1")
EMA, LORA = ("optim.ema=0.9",), ("model.train=lora", "model.lora.rank=2")
RAMP = ("objectives.ra.schedule=linear",)


def trained_state(run: Path) -> dict[str, bytes]:
    """Weights, optimizer, average and projectors of the last step."""
    folder = run / "checkpoints" / "step-000005"
    files = sorted(folder.rglob("*.safetensors"))  # their headers are in no certain order
    return {
        f"{file.name} {name}": value.numpy().tobytes()
        for file in files
        for name, value in load_file(file).items()
    }


def killed(*_: object) -> None:
    raise Killed


def assert_same_run(found: Path, expected: Path) -> None:
    assert len(trained_state(expected)) > 3
    assert trained_state(found) == trained_state(expected)
    assert timeless_metrics(found) == timeless_metrics(expected)
    assert timeless_rows(found) == timeless_rows(expected)
    one, two = (json.loads((run / "result.json").read_text()) for run in (found, expected))
    assert [one[key] for key in ("steps", "aligned", "diverged")] == [
        two[key] for key in ("steps", "aligned", "diverged")
    ]


@pytest.mark.parametrize("settings", [EMA, LORA], ids=["ema", "lora"])
def test_a_prolonged_run_is_the_long_one(
    make_config: MakeConfig,
    train_until: TrainUntil,
    settings: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three steps, two more; with a kill in each leg, and one between the legs."""
    caplog.set_level(logging.INFO, "alignlab")
    long = train(make_config("name=long", "steps=5", *SMALL, *settings))
    short = make_config("name=short", "steps=3", *SMALL, *settings)
    more = make_config("name=short", "steps=5", *SMALL, *settings)
    train_until(short, 2)
    folder = train(short)
    assert train(short) == folder
    assert f"{folder} is finished already: all 3 steps are trained" in caplog.text
    earlier = (folder / "result.json").read_bytes()
    train_until(more, 4)  # after the checkpoint of step 3, so that the leg begins there again
    assert (folder / "result-000003.json").read_bytes() == earlier
    assert not (folder / "result.json").exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):  # while the log is tidied up
        patch.setattr(prolong, "write_rows", killed)
        train(more)
    assert_same_run(train(more), long)
    result = json.loads((folder / "result.json").read_text())
    assert result["notes"][-1] == (
        "prolonged: it was planned for fewer steps at first [3 steps from step 0; "
        "5 steps from step 3]"
    )
    legs = json.loads((folder / "history.json").read_text())["legs"]
    assert [leg["steps"] for leg in legs] == [3, 5] and legs[1]["begun"].startswith("20")
    assert RunFolder.open(folder).config().steps == 5
    assert not (long / "history.json").exists()


def test_a_stopped_run_is_prolonged_too(make_config: MakeConfig, train_until: TrainUntil) -> None:
    long = train(make_config("name=long", "steps=5", *SMALL))
    train_until(make_config("name=short", "steps=4", *SMALL), 3)
    short = train(make_config("name=short", "steps=5", *SMALL))
    assert_same_run(short, long)
    assert not list(short.glob("result-*.json"))


@pytest.mark.parametrize("moment", ["history.json", "result-000001.json", "recipe.yaml"])
def test_a_kill_between_the_legs_loses_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Of either command: that of the old number of steps and that of the new one."""
    short = make_config("name=short", "steps=1", *SMALL)
    more = make_config("name=short", "steps=2", *SMALL)
    folder = train(short)
    earlier, replace = (folder / "result.json").read_bytes(), os.replace

    def dying(source: Path, target: Path) -> None:
        if target.name == moment:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dying)
        train(more)
    assert train(short) == folder
    assert (folder / "result.json").read_bytes() == earlier
    assert json.loads((train(more) / "result.json").read_text())["steps"] == 2


def learning_rates(run: Path) -> list[float]:
    return [row["lr"] / 1e-3 for row in read_rows(run / "metrics.jsonl") if "lr" in row]


def test_stretch_plans_schedules_anew_from_the_resumed_step_on(make_config: MakeConfig) -> None:
    """The learning rate and the weight of an objective alike."""
    every = ("tracking.log_every=1", "eval.clips=1", "optim.batch_size=1")
    settings = ("name=short", *every, "optim.schedule=linear", *RAMP)
    train(make_config("steps=2", *settings))
    stretched = make_config("steps=4", *settings, "optim.resume_schedule=stretch")
    folder = train(stretched)
    assert learning_rates(folder) == pytest.approx([1, 1 / 2, 2 / 4, 1 / 4])
    rows = read_rows(folder / "metrics.jsonl")
    ramp = [row["schedule/ra"] for row in rows if "lr" in row]
    assert ramp == pytest.approx([1, 1 / 2, 2 / 4, 1 / 4])
    # how it was planned is the folder's: the finished run is the same with and without the setting
    assert train(make_config("steps=4", *settings)) == folder


def test_keep_leaves_a_schedule_at_its_last_value(make_config: MakeConfig) -> None:
    settings = ("name=short", "tracking.log_every=1", "eval.clips=1", "optim.batch_size=1")
    ramp = ("objectives.ra.schedule={kind: linear, final: 0.5}",)
    train(make_config("steps=2", *settings, *ramp))
    folder = train(make_config("steps=4", *settings, *ramp, "optim.resume_schedule=keep"))
    rows = read_rows(folder / "metrics.jsonl")
    found = [row["schedule/ra"] for row in rows if "lr" in row]
    assert found == pytest.approx([1, 0.75, 0.5, 0.5])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            ("steps=3",),
            ("steps=2",),
            "holds this run with 3 steps, 1 of them trained: steps=2 is fewer, and no step is "
            "taken back: give steps=3 or more",
        ),
        (
            ("optim.schedule=cosine", *RAMP),
            ("optim.schedule=cosine", *RAMP, "steps=9"),
            "optim.schedule (cosine) and objectives.ra.schedule (linear without end) was planned "
            "for 2 steps, 1 of them trained: to go on to 9, say optim.resume_schedule=stretch",
        ),
        (
            ("optim.schedule=linear",),
            ("optim.schedule=linear", "steps=9", "optim.resume_schedule=keep"),
            "reaches a learning rate of 0 after 2 steps, so the others would train nothing: use "
            "stretch",
        ),
        (
            (),
            ("steps=9", "optim.lr=2e-3"),
            "of another recipe (optim.lr was 0.001, is 0.002; steps was 2, is 9): ",
        ),
    ],
    ids=["fewer", "undecided", "keep", "other recipe"],
)
def test_what_cannot_be_prolonged_is_refused_in_a_line(
    make_config: MakeConfig, before: tuple[str, ...], after: tuple[str, ...], expected: str
) -> None:
    folder = RunFolder.create(make_config(*before))
    (folder.checkpoints / "step-000001").mkdir(parents=True)
    held = folder.recipe.read_text()
    with pytest.raises(UserError) as error:
        RunFolder.create(make_config(*after))
    assert expected in str(error.value)
    assert folder.recipe.read_text() == held


def test_a_finished_run_without_checkpoints_is_not_prolonged(make_config: MakeConfig) -> None:
    folder = RunFolder.create(make_config())
    folder.result.write_text(json.dumps({"steps": 2, "metrics": {}}))
    with pytest.raises(UserError, match="finished, and its checkpoints were dropped"):
        RunFolder.create(make_config("steps=3"))


def test_the_legs_are_read_as_far_as_they_are_planned(make_config: MakeConfig) -> None:
    """What a leg that never began planned counts for nothing."""
    config: RunConfig = make_config("steps=4", "optim.schedule=linear")
    folder = RunFolder.create(config)
    legs = [{"steps": 4}, {"steps": 8, "from_step": 3, "resume_schedule": "stretch"}]
    (folder.path / prolong.HISTORY).write_text(json.dumps({"legs": legs}))
    assert prolong.plan_of(folder, config).total_steps(3) == 4
    longer = config.model_copy(update={"steps": 8})
    plan = prolong.plan_of(folder, longer)
    assert [plan.total_steps(step) for step in (2, 3, 7)] == [4, 8, 8]
    (folder.path / prolong.HISTORY).write_text("[{")
    with pytest.raises(UserError, match=r"history\.json is damaged"):
        prolong.plan_of(folder, config)
