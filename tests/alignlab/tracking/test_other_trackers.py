"""`tracking.also`: TensorBoard and W&B get the rows of `metrics.jsonl`, each once."""

import logging
import struct
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.recipe import recipe_hash
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking import Tracker
from alignlab.tracking.names import tracked_name
from alignlab.train import train

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]
Points = list[tuple[str, int, float]]

TENSORBOARD = 'tracking.also=["tensorboard"]'
WANDB = 'tracking.also=["wandb"]'


@pytest.fixture(autouse=True)
def no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


def written(folder: Path) -> Points:
    """What `metrics.jsonl` has, under the names of trackers."""
    return sorted(
        (tracked_name(name), int(row["step"]), row[name])
        for row in read_rows(folder / "metrics.jsonl")
        for name in row.keys() - {"step", "time"}
    )


def in_tensorboard(folder: Path, *, purged: bool = True) -> Points:
    """What TensorBoard reads of a run, or every point that lies there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=purged
    ).Reload()
    return sorted(
        (name, event.step, event.value)
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    )


def in_wandb(folder: Path) -> Points:
    """The history in all that W&B wrote for a run, one point for each metric and row."""
    found: Points = []
    for file in (folder / "wandb").rglob("*.wandb"):
        for row in _history(file):
            step = int(row.pop("step"))
            names = [name for name in row if not name.startswith("_")]
            found += [(name, step, float(row[name])) for name in names]
    return sorted(found)


def _history(file: Path) -> list[dict[str, Any]]:
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for content in _records(file.read_bytes()):
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            keys = ((item.key or "/".join(item.nested_key), item.value_json) for item in items)
            rows.append({key: json.loads(value) for key, value in keys})
    return rows


def _records(content: bytes) -> list[bytes]:
    """Records of a LevelDB log, after the 7 bytes that W&B puts before it."""
    records, parts, at, size = list[bytes](), list[bytes](), 7, 32768
    while at + 7 <= len(content):
        if size - at % size < 7:
            at += size - at % size
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if not kind:
            break
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(b"".join(parts))
            parts = []
    return records


def approximately(points: Points) -> Any:
    """With 32 bits of each value."""
    return [(name, step, pytest.approx(value, rel=1e-6, abs=1e-30)) for name, step, value in points]


def test_tensorboard_has_each_row_once_also_after_a_kill(
    make_config: MakeConfig, train_until: TrainUntil, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    config = make_config(TENSORBOARD, "steps=4", "checkpoint.every=2")
    train_until(config, 3)  # a row follows the checkpoint
    folder = tmp_path / "run"
    assert in_tensorboard(folder) == approximately(written(folder))
    (mine,) = (folder / "tensorboard").iterdir()
    other = mine.with_name("events.out.tfevents.1.mine")
    other.write_bytes(b"")
    train(config)
    assert in_tensorboard(folder) == approximately(written(folder))
    assert in_tensorboard(folder, purged=False) == approximately(written(folder))
    assert {name for name, _, _ in written(folder)} > {"loss/total", "val/flow", "loss/ra/pull"}
    assert other.exists() and mine.stat().st_size == 0


def test_an_open_tensorboard_drops_what_a_resumed_run_writes_again(
    make_config: MakeConfig, train_until: TrainUntil, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(TENSORBOARD, "steps=4", "checkpoint.every=2")
    train_until(config, 3)
    watching = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in watching.Scalars("loss/total")] == [1, 2, 3]
    train(config)
    watching.Reload()
    assert [event.step for event in watching.Scalars("loss/total")] == [1, 2, 3, 4]


def test_rows_before_the_tracker_was_asked_for_are_there(
    make_config: MakeConfig, train_until: TrainUntil, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    train_until(make_config("steps=3", "checkpoint.every=1"), 2)
    folder = train(make_config("steps=3", "checkpoint.every=1", TENSORBOARD))
    assert in_tensorboard(folder) == approximately(written(folder))


def test_a_tracker_that_fails_is_told_once_and_ends_no_training(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    config = make_config(TENSORBOARD)
    folder = RunFolder.create(config)
    (folder.path / "tensorboard").write_text("no folder")
    with Tracker(folder, config, start=0, environment={}) as tracker:
        for step in range(3):
            tracker.log(step, {"loss/total": 1.0})
    assert caplog.text.count("TensorBoard: ") == 1 and "metrics.jsonl has every row" in caplog.text
    assert len(read_rows(folder.metrics)) == 3


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_told_before_the_run_begins(
    name: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = metadata.version

    def missing(package: str) -> str:
        if package == name:
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr("alignlab.tracking.other_trackers.version", missing)
    with pytest.raises(UserError) as told:
        train(make_config(f'tracking.also=["{name}"]'))
    assert str(told.value) == (
        f"tracking.also: {name} is not installed: pip install 'alignlab[{name}]', or leave "
        f"{name} out"
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_trackers_change_no_identity_of_a_recipe(make_config: MakeConfig) -> None:
    asked = make_config('tracking.also=["wandb","tensorboard"]', "tracking.system_metrics=true")
    assert recipe_hash(asked) == recipe_hash(make_config())
    with pytest.raises(UserError, match="name each tracker once"):
        make_config('tracking.also=["wandb","wandb"]')


def test_wandb_is_offline_and_has_each_row_once_also_after_a_kill(
    make_config: MakeConfig,
    train_until: TrainUntil,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("wandb")
    secret = "https://user:secret-word@127.0.0.1:9"
    monkeypatch.setattr("sys.argv", ["alignlab", "train", f"tracking.mlflow={secret}"])
    config = make_config(
        WANDB, "steps=4", "checkpoint.every=2", "name=mine/none/seed-0", f"tracking.mlflow={secret}"
    )
    with caplog.at_level(logging.CRITICAL, "alignlab.tracking.connection"):
        train_until(config, 3)
    folder = tmp_path / "mine" / "none" / "seed-0"
    train(config)
    assert in_wandb(folder) == approximately(written(folder))
    (one,) = (folder / "wandb").glob("offline-run-*")
    for file in one.rglob("*"):
        assert not file.is_file() or b"secret-word" not in file.read_bytes()


def test_wandb_online_gets_only_what_follows_the_last_row_that_it_was_given(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    init, asked = wandb.init, list[dict[str, Any]]()

    def without_network(**arguments: Any) -> Any:
        asked.append(arguments)
        return init(**(arguments | {"mode": "offline", "resume": None}))

    monkeypatch.setattr(wandb, "init", without_network)
    monkeypatch.setenv("WANDB_MODE", "online")
    config = make_config(WANDB)
    folder = RunFolder.create(config)
    # killed after step 4 and the checkpoint of step 3; then the evaluation at the last step
    for start, steps in ((0, (0, 1, 2, 3, 4)), (3, (4, 5, 5))):
        with Tracker(folder, config, start=start, environment={}) as tracker:
            for number, step in enumerate(steps):
                tracker.log(step, {"val/flow" if number == 6 else "loss/total": float(number)})
    assert [step for _, step, _ in in_wandb(folder.path)] == [0, 1, 2, 3, 4, 5, 5]
    assert asked[0]["id"] == asked[1]["id"]
    assert {(each["mode"], each["resume"]) for each in asked} == {("online", "allow")}
