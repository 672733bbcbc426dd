"""A comparison end to end: two variants, two seeds, one report; killed, continued, reused."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.config.written_names import refuse_written
from alignlab.environment import read_environment
from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, load_compare
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.compare.run import compare, trained_on
from alignlab.experiments.launchers import local
from alignlab.runs.checksums import write_json
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.train import Trainer, train
from alignlab.training.batches import Batch
from alignlab.training.step_terms import StepScalars
from kills import Killed
from run_contents import timeless
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeCompare = Callable[..., CompareConfig]

VARIANTS = """
cost: {rounds: 6}
baseline: none
seeds: [0, 1]
variants:
  none: {}
  aligned:
    objectives.ra: {name: refalign, teacher: dino, blocks: [0, 2], gate: t^3}
"""


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair") / "pair.yaml"
    comparison_recipe(recipe_file, path, "checkpoint: {every: 1}\n" + VARIANTS)
    path.write_text(path.read_text().replace("sample_clips: 0", "sample_clips: 1"))
    return path


@pytest.fixture(scope="module")
def report(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished comparison; its folder is not to be changed."""
    output = tmp_path_factory.mktemp("comparisons")
    return compare(load_compare(recipe, [f"output={output}"]))


@pytest.fixture
def make(recipe: Path, tmp_path: Path) -> MakeCompare:
    """`make("seeds=[0]")`: the comparison in the test's folder, whose cost is not measured."""
    return lambda *overrides: load_compare(recipe, [f"output={tmp_path}", "cost=null", *overrides])


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.glob("*/seed-*/**/*") if p.is_file()}


def numbers(comparison: Comparison) -> dict[tuple[str, int], dict[str, float]]:
    return {(run.variant, run.seed): timeless(run.metrics) for run in comparison.results}


def no_training(*_: object, **__: object) -> None:
    raise AssertionError("trained again")


def test_the_report_has_every_variant_and_run(report: Path) -> None:
    text = report.read_text()
    assert report.name == "report.html" and "aligned" in text and "none" in text
    found = Comparison.load(report.parent / "comparison.json")
    assert found.variants == ("none", "aligned") and found.seeds == (0, 1)
    assert {(run.variant, run.seed) for run in found.results} == {
        (variant, seed) for variant in found.variants for seed in found.seeds
    }
    assert found.duration_s > 0 and found.environment["torch"]
    for run in found.results:
        assert run.steps == 2
        assert dict(run.curves["loss/flow"]).keys() == {1, 2}
        (clip,) = run.samples
        for name in (clip.video, clip.real, *clip.references):
            assert name is not None and (report.parent / run.run_dir / name).is_file()


def test_an_optimizer_whose_package_is_missing_is_told_before_any_run(
    make: MakeCompare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: str) -> object:
        return None if name == "bitsandbytes" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(UserError, match=r"adamw_8bit needs bitsandbytes, .*pip install"):
        compare(make("variants.eight={optim.name: adamw_8bit}"))
    assert not (tmp_path / "pair").exists()


def test_no_run_or_variant_may_have_the_name_of_what_a_comparison_writes(report: Path) -> None:
    names = {path.name for path in report.parent.iterdir()} - {"none", "aligned"}
    assert names
    for name in names:
        with pytest.raises(ValueError, match="alignlab"):
            refuse_written(name)


def test_differing_settings_are_the_variants_changes(report: Path) -> None:
    differing = Comparison.load(report.parent / "comparison.json").differing
    assert all(setting.startswith("objectives.ra.") for setting in differing)
    assert differing["objectives.ra.name"] == {"none": None, "aligned": "refalign"}
    assert differing["objectives.ra.gate.kind"] == {"none": None, "aligned": "power"}


def test_a_variant_without_objectives_is_measured_alike(report: Path) -> None:
    found = Comparison.load(report.parent / "comparison.json")
    for seed in found.seeds:
        plain, aligned = found.run("none", seed), found.run("aligned", seed)
        assert plain is not None and aligned is not None
        assert plain.metrics.keys() == aligned.metrics.keys()
        assert {"teacher_retrieval/block0", "cknna/block2"} <= plain.metrics.keys()
        assert plain.metrics["params/extra"] == 0 < aligned.metrics["params/extra"]
        # the first step sees the same weights, clips, noise and noise levels
        assert plain.curves["loss/flow"][0] == aligned.curves["loss/flow"][0]
        assert plain.curves["loss/flow"][1] != aligned.curves["loss/flow"][1]
    first = [found.run("none", seed) for seed in found.seeds]
    assert len({run.curves["loss/flow"][0] for run in first if run is not None}) == 2


def test_finished_runs_are_reused(
    report: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = report.parent
    before, earlier = stamps(folder), Comparison.load(folder / "comparison.json")
    monkeypatch.setattr(local, "train", no_training)
    assert compare(load_compare(recipe, [f"output={folder.parent}"])) == report
    assert stamps(folder) == before
    again = Comparison.load(folder / "comparison.json")
    assert again.results == earlier.results
    assert again.duration_s == earlier.duration_s


def test_a_new_seed_keeps_the_finished_ones(make: MakeCompare, tmp_path: Path) -> None:
    compare(make("seeds=[0]"))
    before = stamps(tmp_path / "pair")
    report = compare(make("seeds=[0,1]"))
    after = stamps(tmp_path / "pair")
    assert {path: after[path] for path in before} == before
    assert len(Comparison.load(report.parent / "comparison.json").results) == 4


@pytest.mark.parametrize("within", [False, True])
def test_a_killed_comparison_goes_on(
    make: MakeCompare, report: Path, within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the first run and the second, or inside the second."""
    config = make()
    runs: list[str] = []

    take_step = Trainer.step

    def killed_run(trainer: Trainer, batches: list[Batch]) -> StepScalars:
        if len(runs) == 2 and trainer.state.step == 1:
            raise Killed
        return take_step(trainer, batches)

    def counted(*args: object, **kwargs: object) -> Path:
        runs.append("run")
        if len(runs) == 2 and not within:
            raise Killed
        return train(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(local, "train", counted)
        patch.setattr(Trainer, "step", killed_run)
        with pytest.raises(Killed):
            compare(config)
    folder = Path(config.output) / config.name
    killed = stamps(folder)
    first = {p: t for p, t in killed.items() if p.is_relative_to(folder / "none")}
    assert folder / "none" / "seed-0" / "result.json" in first
    assert not (folder / "aligned" / "seed-0" / "result.json").exists()
    assert (folder / "aligned" / "seed-0" / "checkpoints").exists() == within
    assert not (folder / "comparison.json").exists()

    resumed = compare(config)
    after = stamps(folder)
    assert {path: after[path] for path in first} == first
    if within:  # the second run resumes from its checkpoint
        checkpoint = folder / "aligned" / "seed-0" / "checkpoints" / "step-000001" / "state.json"
        assert after[checkpoint] == killed[checkpoint]
    found = Comparison.load(resumed.parent / "comparison.json")
    assert numbers(found) == numbers(Comparison.load(report.parent / "comparison.json"))
    rows = read_rows(folder / "aligned" / "seed-0" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]


def test_a_changed_recipe_is_refused_before_anything_is_trained(
    make: MakeCompare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make("seeds=[0]")
    (tmp_path / "pair").mkdir()
    compare(config)
    monkeypatch.setattr(local, "train", no_training)
    with pytest.raises(UserError, match="another recipe"):
        compare(make("seeds=[0]", "optim.lr=2e-3"))
    # seed 1 is still to be trained, but the variant that changed comes later
    with pytest.raises(UserError, match=r"aligned/seed-0 holds a run of another recipe"):
        compare(make("seeds=[1,0]", "variants.aligned.objectives.ra.weight=0.5"))


def test_time_of_earlier_sessions_counts(make: MakeCompare, tmp_path: Path) -> None:
    config = make("seeds=[0]")
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "progress.json").write_text(json.dumps({"seconds": 1000.0}))
    report = compare(config)
    assert Comparison.load(report.parent / "comparison.json").duration_s > 1000


def test_runs_of_different_threads_are_told(
    report: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folders = {}
    for seed in (0, 1):
        given = read_environment(report.parent / f"none/seed-{seed}/environment.json")
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_json(folder / "environment.json", given | {"threads": str(seed + 1)})
        folders["none", seed] = RunFolder(folder)
    assert trained_on(folders)["threads"] == "1, 2"
    assert "threads: runs were trained with 1 and with 2" in caplog.text


def test_a_variant_with_nothing_to_align_is_refused_before_any_training(
    make: MakeCompare, tmp_path: Path
) -> None:
    never = "variants.aligned.objectives.ra.schedule={kind: stop_at, step: 0}"
    with pytest.raises(UserError, match=r"^objectives\.ra\.schedule: it stops at step 0"):
        compare(make(never))
    assert not list(tmp_path.rglob("metrics.jsonl"))
