"""Comparisons on real Ray clusters: two nodes one of which is killed, an interrupt, an error."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import ray_tools
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.run import compare
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import HOLDER
from processes import descendants, parents
from run_contents import timeless_metrics
from small_recipes import comparison_recipe

pytest.importorskip("ray", reason="needs Ray: pip install 'alignlab[ray]'")

STEPS = 20
WAIT_S = 300
VARIANTS = """
launch: {cpus: 1}
cost: null
checkpoint: {every: 1}
baseline: none
seeds: [0, 1]
variants:
  none: {}
  aligned:
    objectives.ra: {name: refalign, teacher: dino, blocks: [0, 2], gate: t^3}
"""


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparison_recipe(recipe_file, tmp_path_factory.mktemp("pair") / "pair.yaml", VARIANTS)


def arguments(recipe: Path, output: Path, *options: str) -> list[str]:
    return ["compare", str(recipe), f"output={output}", f"steps={STEPS}", *options]


def caught_run(folder: Path, below: int, driver: subprocess.Popen[bytes]) -> Path:
    """A run in its middle that a process of this node trains."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and driver.poll() is None:
        for holder in folder.glob(f"*/seed-*/{HOLDER}"):
            run = holder.parent
            begun = list(run.glob("checkpoints/step-*")) and not (run / "result.json").exists()
            if begun and int(holder.read_text().rsplit(" ", 1)[1]) in descendants(below):
                return run
        time.sleep(0.05)
    raise AssertionError("no run was caught in its middle")


def numbers(folder: Path) -> dict[str, dict[str, float]]:
    """Metrics of all runs that are functions of the recipe."""
    return {
        str(path.parent.relative_to(folder)): timeless_metrics(path.parent)
        for path in folder.glob("*/seed-*/result.json")
    }


def weights(folder: Path, steps: int) -> dict[str, bytes]:
    """Every file of the last checkpoints: weights, projectors, optimizer."""
    last = folder.glob(f"*/seed-*/checkpoints/step-{steps:06d}/**/*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in last}


@pytest.fixture(scope="module")
def local_folder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the local launcher makes of the comparison."""
    output = tmp_path_factory.mktemp("local")
    return compare(load_compare(recipe, [f"output={output}", f"steps={STEPS}"])).parent


@pytest.mark.slow
def test_a_killed_nodes_runs_resume_elsewhere_and_end_as_if_nothing_had_happened(
    recipe: Path, local_folder: Path, tmp_path: Path
) -> None:
    log = tmp_path / "out.txt"
    folder = tmp_path / "pair"
    words = arguments(recipe, tmp_path, "--launcher", "ray", "--ray-address")
    with (
        ray_tools.nodes("") as cluster,
        ray_tools.command(log, *words, cluster.address) as driver,
    ):
        killed = caught_run(folder, cluster.raylets[1], driver)
        cluster.kill(1)
        when = time.time()
        assert not (killed / "result.json").exists(), "it was killed too late"
        assert driver.wait(WAIT_S) == 0, log.read_text()
    text = log.read_text()
    variant, seed = killed.parent.name, killed.name.removeprefix("seed-")
    assert f"{variant}, seed {seed}: its worker died" in text and "resumes from step" in text
    assert "runs to train: 4, nodes: 2; each run takes 1 CPU\n" in text and "report: " in text
    rows = read_rows(killed / "metrics.jsonl")
    assert rows[1]["time"] < when < rows[-1]["time"], "the steps before the kill are kept"
    assert (killed / "worker.log").read_text().count(" process ") == 2
    assert len(numbers(local_folder)) == 4
    assert numbers(folder) == numbers(local_folder)
    assert weights(folder, STEPS).keys() == weights(local_folder, STEPS).keys()
    assert weights(folder, STEPS) == weights(local_folder, STEPS)


@pytest.mark.slow
def test_runs_that_ray_trains_are_those_of_the_local_launcher(
    recipe: Path, local_folder: Path, tmp_path: Path
) -> None:
    """One node, started by the command itself."""
    log = tmp_path / "out.txt"
    words = arguments(recipe, tmp_path, "seeds=[1]", "--launcher", "ray")
    with ray_tools.command(log, *words) as driver:
        assert driver.wait(WAIT_S) == 0, log.read_text()
    folder = tmp_path / "pair"
    expected = {run: metrics for run, metrics in numbers(local_folder).items() if "seed-1" in run}
    assert len(expected) == 2 and numbers(folder) == expected
    assert weights(folder, STEPS).items() <= weights(local_folder, STEPS).items()
    assert "runs to train: 2, nodes: 1; each run takes 1 CPU\n" in log.read_text()


@pytest.mark.slow
def test_an_interrupted_comparison_resumes_with_either_launcher(
    recipe: Path, local_folder: Path, tmp_path: Path
) -> None:
    log = tmp_path / "out.txt"
    folder = tmp_path / "pair"
    with ray_tools.command(log, *arguments(recipe, tmp_path, "--launcher", "ray")) as driver:
        interrupted = caught_run(folder, driver.pid, driver)
        pid = int((interrupted / HOLDER).read_text().rsplit(" ", 1)[1])
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
        assert driver.wait(WAIT_S) == 130, log.read_text()
        assert pid not in parents(), "the run continues without the command"
    assert "Traceback" not in log.read_text()
    assert not (interrupted / "result.json").exists()
    assert (interrupted / "worker.log").read_text().count("ended by Interrupted") == 1
    compare(load_compare(recipe, [f"output={tmp_path}", f"steps={STEPS}"]))
    assert numbers(folder) == numbers(local_folder)
    assert weights(folder, STEPS) == weights(local_folder, STEPS)


@pytest.mark.slow
def test_an_error_of_a_run_ends_the_comparison_with_one_line(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "out.txt"
    words = arguments(recipe, tmp_path, "--launcher", "ray", "model.path=nothing/there")
    with ray_tools.command(log, *words) as driver:
        assert driver.wait(WAIT_S) == 2, log.read_text()
    text = log.read_text()
    assert "Traceback" not in text
    (line,) = [line for line in text.split("\n") if line.startswith("error: ")]
    assert "seed " in line and "nothing/there" in line
