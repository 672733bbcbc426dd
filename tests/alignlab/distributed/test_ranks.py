"""Two real processes that train one run: as one process would, and as if never interrupted."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.recipe import load_run
from alignlab.train import train
from rank_processes import driven
from ranks_run import train_pairs
from run_contents import timeless_rows

# Clips have no, one, two or three references, so that a process may have none in a round.
RECIPE_CHANGES = {
    "steps: 2": "steps: 6",
    "references: [2, 3]": "references: [0, 3], workers: 1",
    "blocks: [0, 2]}": "blocks: [0, 2], weight: {gradient_share: 0.3, steps: 4}}",
    "batch_size: 2}": "batch_size: 4, accumulate: 2, ema: 0.9}",
    "{clips: 2,": "{every: 2, clips: 2,",
    "mlflow: none, log_every: 1": "mlflow: sqlite, log_every: 1, diagnose_every: 3",
}
PLATEAU = (
    "  repa: {name: repa, teacher: dino, blocks: [1], projector_dim: 8, "
    "schedule: {kind: stop_at_plateau, decay: 0.0, patience: 2, min_delta: 9.0}}\noptim:"
)


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = recipe_file.read_text().replace("optim:", PLATEAU)
    for before, after in RECIPE_CHANGES.items():
        assert before in text
        text = text.replace(before, after)
    path = tmp_path_factory.mktemp("processes") / "recipe.yaml"
    path.write_text(text + "checkpoint: {every: 3}\n")
    return path


ENDS = {
    "whole": "0 0",
    "killed": "-9 -9",
    "unreached": "0 0",
    "lora": "0 0",
    "warned": "138 138",
    "drifted": "2 2",
    "teacher": "2 2",
    "parts": "2 2",
    "gone": "2 9",
    "odd": "2 2",
    "across": "2 2",
}


@pytest.fixture(scope="module")
def pairs(recipe: Path) -> Path:
    """The folder of all outputs, by moment; `killed` was resumed, `whole` asked for again."""
    folder = recipe.parent
    first = [f"{moment}={folder / moment}" for moment in ENDS]
    later = {"whole": folder / "killed", "again": folder / "whole", "other": folder / "whole"}
    jobs = first + [f"{moment}={output}" for moment, output in later.items()]
    ends = driven(lambda: train_pairs(recipe, jobs), folder / "driver")
    assert dict(zip(ENDS, ends, strict=False)) == ENDS
    assert ends[len(ENDS) :] == ["0 0", "0 0", "2 2"]
    return folder


def said(pairs: Path, name: str) -> list[str]:
    """The last line of both processes."""
    texts = [(pairs / f"{name}.{rank}").read_text() for rank in range(2)]
    return [text.strip().split("\n")[-1] for text in texts]


def weights(output: Path) -> dict[str, torch.Tensor]:
    step = output / "run" / "checkpoints" / "step-000006"
    return {
        f"{path.name} {key}": value
        for path in sorted(step.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def rows(output: Path) -> list[dict[str, float]]:
    return timeless_rows(output / "run")


def test_two_processes_train_as_one_does(pairs: Path, recipe: Path, tmp_path: Path) -> None:
    train(load_run(recipe, [f"output={tmp_path}", "tracking.mlflow=none"]))
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


def test_a_signal_to_one_process_stops_both_after_the_same_step(pairs: Path) -> None:
    left = [path.name for path in (pairs / "warned" / "run" / "checkpoints").iterdir()]
    assert sorted(left) == ["step-000003", "step-000004"]
    first, second = said(pairs, "warned-warned")
    assert first.startswith("interrupted (SIGUSR1) after step 4 of 6 (checkpoint at 4)")
    assert "interrupted" not in second


def test_one_process_goes_on_where_two_were_killed(
    pairs: Path, recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(pairs / "as-killed", tmp_path, dirs_exist_ok=True)
    train(load_run(recipe, [f"output={tmp_path}", "tracking.mlflow=none"]))
    for one, two in zip(rows(tmp_path), rows(pairs / "whole"), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_the_first_process_alone_writes_and_speaks(pairs: Path) -> None:
    with sqlite3.connect(pairs / "whole" / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
    environment = json.loads((pairs / "whole" / "run" / "environment.json").read_text())
    assert environment["processes"] == "2"
    said = (pairs / "again-whole.0").read_text().splitlines()
    assert said[-2] == f"run folder: {pairs / 'whole' / 'run'}"
    assert said[-1].startswith("mlflow: ") and said[-1].endswith("/#/experiments/1/runs")
    assert [line for line in said[:-2] if "is finished already" not in line] == []
    assert (pairs / "again-whole.1").read_text() == ""
    assert "val flow" in (pairs / "whole-killed.0").read_text()
    assert (pairs / "whole-killed.1").read_text() == ""


def test_a_lora_in_bf16_without_clipping_is_trained_as_by_one_process(
    pairs: Path, recipe: Path, tmp_path: Path
) -> None:
    lora = ["model.train=lora", "model.lora.rank=4", "model.lora.alpha=8", "model.precision=bf16"]
    lora += ["optim.grad_clip=null", "model.absent_references=zero"]
    train(load_run(recipe, [f"output={tmp_path}", "tracking.mlflow=none", *lora]))
    for one, two in zip(rows(tmp_path), rows(pairs / "lora"), strict=True):
        names = ("loss/total", "loss/flow", "loss/ra", "val/flow", "grad/norm")
        kept = [key for key in one if key in names]
        assert [two[key] for key in kept] == pytest.approx([one[key] for key in kept], rel=5e-3)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("drifted-drifted", "the ranks differ in the norm of the trained weights"),
        ("teacher-teacher", "the ranks differ in the weights of the teacher dino"),
        ("parts-parts", "the ranks log different terms"),
        (
            "odd-odd",
            "optim.batch_size: 3 is no multiple of optim.accumulate times",
        ),
        ("across-across", "objectives.ra: it compares the samples of a batch, which 2 ranks"),
        ("other-whole", "run holds a run of another recipe (optim.lr was 0.001, is 0.0001): "),
    ],
)
def test_both_processes_say_why_they_stop(pairs: Path, name: str, line: str) -> None:
    first, second = said(pairs, name)
    assert first.startswith("error: ") and line in first
    assert second.startswith(f"error (rank 1 of 2): {first.removeprefix('error: ')[:40]}")


def test_nothing_is_saved_of_a_run_that_cannot_go_on(pairs: Path) -> None:
    assert not (pairs / "odd" / "run").exists()
    for moment in ("drifted", "teacher", "parts", "gone", "across"):
        assert not list((pairs / moment).glob("run/checkpoints/step-*"))


def test_a_process_that_is_gone_is_told_of_in_one_line(pairs: Path) -> None:
    last = said(pairs, "gone-gone")[0]
    assert last.startswith("error: another rank has stopped, its own message says why (")
    assert "where it has none it was killed, and the same command resumes" in last


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "WORLD_SIZE=2, but no LOCAL_RANK: start the",
        ),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2, but no MASTER_ADDR: start the",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: not a whole number"),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "2",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "x",
                "MASTER_PORT": "1",
            },
            "RANK=2, but WORLD_SIZE=2",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "x",
                "MASTER_PORT": "abc",
            },
            "MASTER_PORT=abc: not a whole number",
        ),
        ({"WORLD_SIZE": "", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8, but no"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8, but no WORLD_SIZE"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "accelerate is configured for torch.compile"),
        ({"ACCELERATE_USE_FSDP": "true"}, "accelerate is configured for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "accelerate is configured for DeepSpeed"),
    ],
)
def test_processes_that_would_train_alone_are_refused(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    line: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["train", str(recipe), f"output={tmp_path}"])
    assert result.exit_code == 2, result.output
    assert line in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
