"""Which checkpoint is resumed or read, and that readers and a pruning writer do not meet."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alignlab.errors import UserError
from alignlab.runs.checkpoint_folders import (
    latest,
    problem,
    prune,
    reading,
    resumable,
    step_of,
)
from alignlab.training.checkpoint import TrainState, restore
from damage import KINDS, delete, flip
from saved_checkpoints import save

Damage = Callable[[Path], None]


@dataclass
class SmallState(TrainState):
    network: nn.Module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.network.named_parameters()

    def write_weights(self, folder: Path) -> None:
        save_file(self.network.state_dict(), folder / "network.safetensors")

    def read_weights(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.network.load_state_dict(load_file(folder / "network.safetensors"))


def state_at(step: int) -> SmallState:
    """All weights and moments are the step."""
    network = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(step)
    return SmallState(optimizer, step=step, network=network)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Of the steps 1, 2 and 3."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        save(state_at(step), folder, keep=9)
    return folder


FILES = ("network.safetensors", "optimizer.safetensors", "state.json", "checksums.json", "log.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", KINDS, ids=lambda k: k.__name__)
def test_the_older_checkpoint_is_resumed_and_that_is_said(
    checkpoints: Path, file: str, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    assert resumable(checkpoints) == (checkpoints / "step-000003", ())
    damage(checkpoints / "step-000003" / file)
    newest, notes = resumable(checkpoints)
    if (file, damage) == ("checksums.json", delete):  # as an older version leaves it
        assert newest == checkpoints / "step-000003"
        assert "before checksums were kept" in caplog.text
        return
    assert newest == checkpoints / "step-000002"
    assert notes == ("the checkpoint step-000003 was damaged: an older one was resumed",)
    assert f"step-000003 is damaged ({file}: " in caplog.text
    assert "resuming from the older step-000002" in caplog.text
    # it holds nothing back, is told again by a second start, and goes when its step is reached
    assert resumable(checkpoints) == (newest, notes)
    state = state_at(0)
    restore(state, newest, notes=notes)
    assert (state.step, state.notes) == (2, notes)
    state.step = 3
    save(state, checkpoints, keep=2)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000002", "step-000003"]
    assert problem(checkpoints / "step-000003") is None
    restore(state, checkpoints / "step-000003")
    assert state.notes == notes


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    named: dict[str, set[int]] = {}
    sync, replace = os.fsync, os.replace

    def fsync(number: int) -> None:
        synced.append(os.fstat(number).st_ino)
        sync(number)

    def renamed(source: Path, target: Path) -> None:
        named[Path(target).name] = set(synced)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    checkpoint = save(state_at(1), tmp_path, keep=1)
    inodes = {path.stat().st_ino for path in [checkpoint, *checkpoint.iterdir()]}
    assert inodes <= named["step-000001"]
    assert synced[-1] == tmp_path.stat().st_ino  # and then the name


def test_without_an_older_one_a_line_says_what_to_do(checkpoints: Path) -> None:
    for folder in checkpoints.iterdir():
        flip(folder / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"step-000003 is damaged \(optimizer\.safetensors: ") as e:
        resumable(checkpoints)
    assert ", as are the 2 older ones, and" in str(e.value)
    assert "train from the start" in str(e.value)
    assert len(list(checkpoints.iterdir())) == 3  # else the next start would begin anew


def test_what_only_looks_like_a_checkpoint_is_none(
    checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("step-best", "step-000012.bak", "step-000013.damaged.old", "step-9"):
        (checkpoints / name).mkdir()
    (checkpoints / "step-000099").write_text("")
    assert latest(checkpoints) == checkpoints / "step-000003"
    assert resumable(checkpoints) == (checkpoints / "step-000003", ())
    prune(checkpoints, keep=1)
    assert not (checkpoints / "step-000001").exists() and (checkpoints / "step-best").exists()
    save(state_at(99), checkpoints, keep=1)  # takes the place of the file
    assert latest(checkpoints) == checkpoints / "step-000099"
    # a folder that was renamed by hand is not resumed as another step
    shutil.copytree(checkpoints / "step-000099", checkpoints / "step-000100")
    assert resumable(checkpoints).newest == checkpoints / "step-000099"
    assert "it holds step 99" in caplog.text


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "network.safetensors"])
def test_an_older_version_s_checkpoint_is_resumed_unless_it_is_visibly_cut(
    checkpoints: Path, name: str
) -> None:
    for folder in checkpoints.iterdir():
        (folder / "checksums.json").unlink()
        (folder / "log.json").unlink()
    assert resumable(checkpoints) == (checkpoints / "step-000003", ())
    path = checkpoints / "step-000003" / name
    path.write_bytes(path.read_bytes()[:-9])
    assert resumable(checkpoints).newest == checkpoints / "step-000002"


def test_readers_take_the_newest_whole_weights(
    checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(checkpoints / "step-000003" / "optimizer.safetensors")  # which they do not read
    with reading(checkpoints) as newest:
        assert step_of(newest) == 3
    flip(checkpoints / "step-000003" / "network.safetensors")
    with reading(checkpoints) as newest:
        assert step_of(newest) == 2
    assert "step-000003 is damaged (network.safetensors: " in caplog.text
    assert (checkpoints / "step-000003").exists()  # a reader changes nothing


def test_readers_beside_a_writer_that_keeps_one_checkpoint(tmp_path: Path) -> None:
    checkpoints, ends = tmp_path / "run" / "checkpoints", Event()
    save(state_at(1), checkpoints, keep=1)

    def write() -> None:
        step = 1
        while not ends.is_set():
            step += 1
            save(state_at(step), checkpoints, keep=1)

    writer = Thread(target=write)
    writer.start()
    try:
        steps = []
        for _ in range(50):
            with reading(checkpoints) as newest:
                ends.wait(0.01)  # the writer goes on meanwhile
                weights = load_file(newest / "network.safetensors")
            steps.append(step_of(newest))
            assert torch.equal(weights["weight"], torch.full((4, 4), float(steps[-1])))
    finally:
        ends.set()
        writer.join()
    assert steps == sorted(steps) and len(set(steps)) > 5
    prune(checkpoints, keep=1)
    assert len(list(checkpoints.iterdir())) == 1


def test_a_checkpoint_that_went_while_its_folder_was_listed_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside a writer that keeps one: the next is there, and this listing has it not yet."""
    checkpoints = tmp_path / "run" / "checkpoints"
    save(state_at(2), checkpoints, keep=1)
    listed = Path.glob
    seen: list[Path] = []

    def glob(folder: Path, pattern: str) -> Iterator[Path]:
        seen.append(folder)
        return (
            iter([checkpoints / "step-000001"]) if len(seen) == 1 else iter(listed(folder, pattern))
        )

    monkeypatch.setattr(Path, "glob", glob)
    with reading(checkpoints) as newest:
        assert step_of(newest) == 2
