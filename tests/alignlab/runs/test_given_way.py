"""A run that kept no step does not keep its folder's name."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.recipe import load_run
from alignlab.runs.open_folder import open_folder
from alignlab.runs.run_folder import RunFolder, only_writer
from alignlab.train import train

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]


def test_a_corrected_recipe_takes_over_a_folder_without_a_checkpoint(
    make_config: MakeConfig,
    train_until: TrainUntil,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train_until(make_config("steps=3"), 2)
    folder = tmp_path / "run"
    (folder / ".recipe.yaml.tmp").write_text("of a killed process")
    corrected = make_config("steps=1", "optim.lr=1e-4")
    with caplog.at_level(logging.INFO, "alignlab"):
        train(corrected)
    assert "kept no step: it begins anew" in caplog.text and "optim.lr was" in caplog.text
    assert load_run(folder / "recipe.yaml") == corrected
    expected = train(make_config("steps=1", "optim.lr=1e-4", f"output={tmp_path}/other"))
    steps = [(run / "metrics.jsonl").read_text().count("\n") for run in (folder, expected)]
    assert steps[0] == steps[1], "the rows of the other recipe are gone"
    assert not (folder / ".recipe.yaml.tmp").exists()


def keep_a_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)


def keep_a_result(folder: Path) -> None:
    (folder / "result.json").write_text("{}")


def keep_a_note(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def keep_a_folder(folder: Path) -> None:
    (folder / "checkpoints" / "mine").mkdir(parents=True)


@pytest.mark.parametrize("keep", [keep_a_checkpoint, keep_a_result, keep_a_note, keep_a_folder])
def test_what_holds_more_than_a_start_is_left_alone(
    keep: Callable[[Path], None], make_config: MakeConfig
) -> None:
    folder = RunFolder.create(make_config()).path
    keep(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="holds a run of another recipe"):
        RunFolder.create(make_config("optim.lr=0.5"))
    assert sorted(folder.rglob("*")) == before


def test_a_folder_in_which_a_process_trains_is_left_alone(make_config: MakeConfig) -> None:
    folder = RunFolder.create(make_config()).path
    text = (folder / "recipe.yaml").read_text()
    with (
        only_writer(folder, wait=False),
        pytest.raises(UserError, match="is being trained by another process"),
    ):
        RunFolder.create(make_config("steps=3"))
    assert (folder / "recipe.yaml").read_text() == text


def test_a_process_that_trains_keeps_its_settings(make_config: MakeConfig) -> None:
    """Those that change no number are taken once nobody trains there."""
    folder = RunFolder.create(make_config())
    text = folder.recipe.read_text()
    other = make_config("tracking.log_every=7", "eval.every=1")
    with only_writer(folder.path, wait=False):
        RunFolder.create(other)
        with pytest.raises(UserError, match="is being trained by another"), ExitStack() as locks:
            open_folder(other, locks, wait=False)
    assert folder.recipe.read_text() == text
    RunFolder.create(other)
    assert folder.config() == other


def test_what_another_process_made_of_a_folder_is_seen_under_the_lock(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("optim.lr=0.5")
    folder = RunFolder.create(config)
    monkeypatch.setattr(RunFolder, "create", lambda _: folder)
    folder.recipe.unlink()
    folder.write_recipe(make_config())  # while this one waited
    with pytest.raises(UserError, match="holds a run of another recipe"), ExitStack() as locks:
        open_folder(config, locks, wait=True)
