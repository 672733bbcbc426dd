"""A killed run resumes as if nothing had happened: bitwise, on a CPU with as many threads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignlab.config.run import RunConfig
from alignlab.environment import continued, describe_environment, read_environment
from alignlab.experiments.bench.kernels import install_rows
from alignlab.kernels import speed_table
from alignlab.train import train
from killed_run import run_all
from made_up_rows import GPU, made_up_row
from run_contents import timeless_contents, timeless_metrics, timeless_rows

pytestmark = pytest.mark.usefixtures("shared_clips")

MOMENTS = [
    "before any checkpoint",
    "between checkpoints",
    "right after a checkpoint",
    "while writing a checkpoint",
    "while writing a checkpoint asynchronously",
    "while removing a checkpoint",
    "while evaluating",
]


@pytest.fixture(scope="module")
def outputs(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folders by moment: `<moment>-killed`, as the kill left it, and `<moment>`."""
    folder = tmp_path_factory.mktemp("resume")
    recipe = folder / "recipe.yaml"
    text = recipe_file.read_text().replace("steps: 2", "steps: 8")
    text = text.replace("sample_clips: 0", "sample_clips: 1")
    text = text.replace("batch_size: 2}", "batch_size: 2, warmup: 2, schedule: cosine, ema: 0.9}")
    recipe.write_text(text + "checkpoint: {every: 3, keep: 2}\n")
    run_all(recipe, folder, MOMENTS)
    return folder


def files(output: Path) -> dict[str, bytes]:
    return timeless_contents(output / "run")


def test_the_kills_hit_what_they_aim_at(outputs: Path) -> None:
    left = {
        moment: sorted(p.name for p in (outputs / f"{moment}-killed").glob("run/checkpoints/*"))
        for moment in MOMENTS
    }
    assert left == {
        "before any checkpoint": [],
        "between checkpoints": ["step-000003"],
        "right after a checkpoint": ["step-000003", "step-000006"],
        "while writing a checkpoint": [".step-000006.tmp", "step-000003"],
        "while writing a checkpoint asynchronously": [".step-000006.tmp", "step-000003"],
        "while removing a checkpoint": [".step-000003.removed", "step-000006", "step-000008"],
        "while evaluating": ["step-000006", "step-000008"],
    }
    assert not list(outputs.glob("*-killed/run/result.json"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_the_uninterrupted_one(outputs: Path, moment: str) -> None:
    expected, found = files(outputs / "uninterrupted"), files(outputs / moment)
    assert found.keys() == expected.keys()  # so no temporary file is left either
    assert any(name.endswith("step-000008/ema.safetensors") for name in expected)
    # .writer names the process that trained it last
    exempt = (".writer", "recipe.yaml", "environment.json", "metrics.jsonl", "result.json")
    names = sorted(expected.keys() - set(exempt))
    assert [name for name in names if found[name] != expected[name]] == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_its_log_is_the_uninterrupted_one(outputs: Path, moment: str) -> None:
    runs = [outputs / name / "run" for name in ("uninterrupted", moment)]
    expected, found = map(timeless_rows, runs)
    assert [row["step"] for row in expected] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert found == expected
    one, two = map(timeless_metrics, runs)
    assert one == two
    assert [json.loads((run / "result.json").read_text())["steps"] for run in runs] == [8, 8]


def test_a_run_that_goes_on_with_other_threads_says_so(
    make_config: Callable[..., RunConfig],
    train_until: Callable[[RunConfig, int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """This test only claims to have them: on a busy machine they wait for each other."""
    config = make_config("steps=3", "checkpoint.every=1")
    threads = torch.get_num_threads()
    train_until(config, 1)
    train_until(config, 2)
    assert caplog.text == ""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads + 1)
        folder = train(config)
    facts = read_environment(folder / "environment.json")
    assert facts == describe_environment() | {
        "threads": f"{threads}, then {threads + 1}",
        "processes": "1",
    }
    assert f"{folder}: resumed with threads {threads + 1}, after {threads}: " in caplog.text
    assert caplog.text.count("resumed with") == 1


def test_what_a_run_was_trained_on_before_is_kept(tmp_path: Path) -> None:
    path, facts = tmp_path / "environment.json", {"threads": "1", "torch": "2.13", "command": "a"}
    assert continued(path, facts) == facts
    path.write_text(json.dumps({"threads": "2, then 1", "torch": "2.12", "command": "b"}))
    assert continued(path, facts) == {
        "threads": "2, then 1",
        "torch": "2.12, then 2.13",
        "command": "a",
    }


@pytest.mark.parametrize(
    ("device", "expected"), [("NVIDIA H200", "chunked, then 9f86d0"), ("cpu", "9f86d0")]
)
def test_a_gpu_run_of_before_kernels_were_recorded_went_on_with_chunked(
    tmp_path: Path, device: str, expected: str
) -> None:
    path = tmp_path / "environment.json"
    path.write_text(json.dumps({"device": device, "torch": "2.13"}))
    now = {"device": "NVIDIA H200", "torch": "2.13", "kernels": "9f86d0"}
    assert continued(path, now)["kernels"] == expected
    assert continued(path, now | {"kernels": "chunked"})["kernels"] == "chunked"


def test_a_run_that_goes_on_with_other_kernels_says_so(
    make_config: Callable[..., RunConfig],
    train_until: Callable[[RunConfig, int], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What `impl: auto` goes by is written down for a GPU, which this test only claims to have."""
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    config = make_config("steps=2", "checkpoint.every=1")

    def facts_of_a_gpu() -> dict[str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
            return describe_environment()

    monkeypatch.setattr("alignlab.train.describe_environment", facts_of_a_gpu)
    try:
        train_until(config, 1)
        assert read_environment(tmp_path / "run" / "environment.json")["kernels"] == "chunked"
        install_rows([made_up_row("chunked", 1.0), made_up_row("triton", 0.5)])
        folder = train(config)
    finally:
        speed_table.use_rows(None)
    now = read_environment(folder / "environment.json")["kernels"]
    assert now.startswith("chunked, then ") and now.endswith(" (pull_push float32: triton)")
    assert (
        f"resumed with kernels {now.removeprefix('chunked, then ')}, after chunked" in caplog.text
    )
