"""Two real processes that train one run: as one process would, and as if never interrupted."""

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignlab.recipe import load_run
from alignlab.tracking import read_rows
from alignlab.train import train

DRIVER = Path(__file__).with_name("processes_run.py")
# Clips have no, one, two or three references, so that a process may have none in a round.
RECIPE_CHANGES = {
    "steps: 2": "steps: 6",
    "references: [2, 3]": "references: [0, 3]",
    "batch_size: 2}": "batch_size: 4, accumulate: 2, ema: 0.9}",
    "mlflow: none, log_every: 1": "mlflow: sqlite, log_every: 1, diagnose_every: 3",
}
PLATEAU = (
    "  repa: {name: repa, teacher: dino, blocks: [1], projector_dim: 8, "
    "schedule: {kind: stop_at_plateau, decay: 0.0, patience: 2, min_delta: 9.0}}\noptim:"
)
OURS = ("time/", "memory/")


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = recipe_file.read_text().replace("optim:", PLATEAU)
    for before, after in RECIPE_CHANGES.items():
        assert before in text
        text = text.replace(before, after)
    path = tmp_path_factory.mktemp("processes") / "recipe.yaml"
    path.write_text(text + "checkpoint: {every: 3}\n")
    return path


@pytest.fixture(scope="module")
def pairs(recipe: Path) -> Path:
    """The folder of all outputs, by moment; `killed` went on as `whole`."""
    folder = recipe.parent
    moments = ("whole", "killed", "drifted", "unreached", "odd")
    jobs = [f"{moment}={folder / moment}" for moment in moments]
    codes = drive(recipe, [*jobs, f"whole={folder / 'whole'}"])
    assert codes == ["0 0", "-9 -9", "2 2", "0 0", "2 2", "0 0"]
    shutil.copytree(folder / "killed", folder / "as-killed")
    assert drive(recipe, [f"whole={folder / 'killed'}"]) == ["0 0"]
    return folder


def drive(recipe: Path, jobs: list[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, DRIVER, recipe, *jobs],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")


def weights(output: Path) -> dict[str, torch.Tensor]:
    step = output / "run" / "checkpoints" / "step-000006"
    return {
        f"{path.name} {key}": value
        for path in sorted(step.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def rows(output: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in row.items() if not key.startswith(("time", "memory"))}
        for row in read_rows(output / "run" / "metrics.jsonl")
    ]


def test_two_processes_train_as_one_does(pairs: Path, recipe: Path, tmp_path: Path) -> None:
    train(load_run(recipe, [f"output={tmp_path}"]))
    alone, together = rows(tmp_path), rows(pairs / "whole")
    assert [row.keys() for row in together] == [row.keys() for row in alone]
    assert any("sim/repa" in row for row in alone) and not all("sim/repa" in r for r in alone[1:])
    assert [key for row in alone for key in row if key.startswith("grad/ra/ratio")]
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    expected = weights(tmp_path)
    assert any(key.startswith("optimizer") for key in expected)
    for key, value in weights(pairs / "whole").items():
        torch.testing.assert_close(value, expected.pop(key), rtol=1e-3, atol=2e-5, msg=key)
    assert not expected


def test_a_killed_pair_ends_with_the_bits_of_the_uninterrupted_one(pairs: Path) -> None:
    left = [path.name for path in (pairs / "as-killed" / "run" / "checkpoints").iterdir()]
    assert left == ["step-000003"]
    expected, found = weights(pairs / "whole"), weights(pairs / "killed")
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert rows(pairs / "killed") == rows(pairs / "whole")


def test_one_process_goes_on_where_two_were_killed(
    pairs: Path, recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(pairs / "as-killed", tmp_path, dirs_exist_ok=True)
    (tmp_path / "mlflow.db").unlink()
    train(load_run(recipe, [f"output={tmp_path}"]))
    for one, two in zip(rows(tmp_path), rows(pairs / "whole"), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_the_first_process_alone_writes_and_speaks(pairs: Path) -> None:
    with sqlite3.connect(pairs / "whole" / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
    environment = json.loads((pairs / "whole" / "run" / "environment.json").read_text())
    assert environment["processes"] == "2"
    # the second time the run was finished already
    assert (pairs / "whole.0").read_text() == f"run folder: {pairs / 'whole' / 'run'}\n"
    assert (pairs / "whole.1").read_text() == ""
    assert "val flow" in (pairs / "killed.0").read_text()
    assert (pairs / "killed.1").read_text() == ""


def test_a_parameter_that_the_samples_of_one_process_miss_is_trained_by_both(pairs: Path) -> None:
    whole, half = weights(pairs / "whole"), weights(pairs / "unreached")
    moments = [key for key in whole if key.startswith("optimizer") and key.endswith("exp_avg")]
    # the processes ended with one and the same weight, which half of the gradient has moved
    assert [key for key in moments if not half[key].any()] == []
    assert not torch.equal(whole[moments[-1]], half[moments[-1]])


def test_processes_with_different_weights_are_stopped_before_a_checkpoint(pairs: Path) -> None:
    for rank in range(2):
        last = (pairs / f"drifted.{rank}").read_text().strip().split("\n")[-1]
        assert last.startswith("error")
        assert "the processes differ in the norm of the trained weights" in last
    assert not list((pairs / "drifted" / "run" / "checkpoints").glob("step-*"))


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(pairs: Path) -> None:
    line = "optim.batch_size: 3 samples per step do not divide into 1 accumulation rounds"
    assert (pairs / "odd.0").read_text() == f"error: {line} on 2 processes\n"
    assert (pairs / "odd.1").read_text() == f"error (process 2 of 2): {line} on 2 processes\n"
    assert not (pairs / "odd" / "run").exists()
