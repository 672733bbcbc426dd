"""A comparison with other variants, seeds or steps takes over the runs that are there."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, load_compare
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.compare.run import compare, prepare, unfinished
from alignlab.experiments.verify import verify_folder
from alignlab.recipe import load_run
from alignlab.runs.run_folder import RunFolder
from alignlab.train import train
from kills import Killed
from run_contents import file_contents, timeless
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeCompare = Callable[..., CompareConfig]

SHARED = "checkpoint: {every: 1, keep: 1}\ncost: null\nbaseline: none\n"
ONE = SHARED + (
    "seeds: [0]\nvariants:\n  none: {}\n"
    "  first: {objectives.ra: {name: refalign, teacher: dino, blocks: [0]}}\n"
)
MORE = ONE.replace("seeds: [0]", "seeds: [0, 1]") + (
    "  later: {objectives.ra: {name: refalign, teacher: dino, blocks: [2]}}\n"
)


@pytest.fixture(scope="module")
def recipes(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `one/pair.yaml` and `more/pair.yaml`, which has a seed and a variant more."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, variants in (("one", ONE), ("more", MORE)):
        (folder / name).mkdir()
        path = comparison_recipe(recipe_file, folder / name / "pair.yaml", variants)
        path.write_text(path.read_text().replace("eval: {clips: 2", "eval: {clips: 1"))
    return folder


@pytest.fixture(scope="module")
def outputs(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`: of the small recipe; `more`: of the large one, from the start. Not to be changed."""
    folder = tmp_path_factory.mktemp("outputs")
    for name in ("one", "more"):
        compare(load_compare(recipes / name / "pair.yaml", [f"output={folder / name}"]))
    return folder


@pytest.fixture
def make(recipes: Path, outputs: Path, tmp_path: Path) -> MakeCompare:
    """`make("more", "steps=3")`: that recipe, over the folder that the small one has made."""
    shutil.copytree(outputs / "one", tmp_path / "runs")

    def config(name: str, *overrides: str) -> CompareConfig:
        overrides = (f"output={tmp_path / 'runs'}", *overrides)
        return load_compare(recipes / name / "pair.yaml", list(overrides))

    return config


def numbers(folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    found = Comparison.load(folder / "comparison.json")
    return {(run.variant, run.seed): timeless(run.metrics) for run in found.results}


def trained(folder: Path) -> dict[str, bytes]:
    return {
        name: content
        for name, content in file_contents(folder).items()
        if name.endswith(".safetensors")
    }


def test_finished_runs_are_measured_on_the_blocks_of_a_later_variant(
    make: MakeCompare, outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They end as those of a comparison that had the variant from the start, untrained."""
    caplog.set_level(logging.INFO, "alignlab")
    folder = compare(make("more")).parent
    assert "2 of 6 runs are finished already" in caplog.text
    assert "2 of 6 runs were measured without block 2" in caplog.text
    expected = numbers(outputs / "more" / "pair")
    assert "cknna/block2" in expected["none", 0]
    assert numbers(folder) == expected
    names = [list(metrics) for metrics in numbers(folder).values()]
    assert all(found == names[-1] for found in names)  # in one order
    for variant in ("none", "first"):
        run, before = (f / variant / "seed-0" for f in (folder, outputs / "one" / "pair"))
        assert trained(run) == trained(before)
        assert RunFolder.open(run).config().eval.blocks == (0, 2)
    caplog.clear()
    assert compare(make("more")).parent == folder
    assert "measured without" not in caplog.text and "6 of 6 runs are finished" in caplog.text
    # without the variant again: its runs are left, and the report is of the others' blocks
    compare(make("one"))
    assert numbers(folder) == numbers(outputs / "one" / "pair")
    assert (folder / "later" / "seed-0" / "result.json").exists()


def test_a_kill_while_a_block_is_measured_is_made_up_for(
    make: MakeCompare, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, replace = make("more", "seeds=[0]"), os.replace

    def dying(source: Path, target: Path) -> None:
        if target.parts[-3:] == ("none", "seed-0", "recipe.yaml"):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dying)
        compare(config)
    expected = {key: v for key, v in numbers(outputs / "more" / "pair").items() if key[1] == 0}
    assert numbers(compare(config).parent) == expected


def test_a_run_whose_checkpoints_are_gone_is_not_measured_on_more_blocks(
    make: MakeCompare, tmp_path: Path
) -> None:
    config = make("more", "seeds=[0]")
    shutil.rmtree(tmp_path / "runs" / "pair" / "none" / "seed-0" / "checkpoints")
    with pytest.raises(UserError, match="the checkpoint of its last step is gone: set eval") as e:
        compare(config)
    assert "pair/none/seed-0 was measured on other blocks than 0, 2" in str(e.value)


def test_a_prolonged_comparison_is_the_long_one(
    make: MakeCompare, recipes: Path, tmp_path: Path
) -> None:
    more = make("one", "steps=3")
    before = file_contents(tmp_path / "runs")
    listed = unfinished(more)  # for an `alignlab train` of each
    assert [load_run(path, stored=True).steps for path in listed] == [3, 3]
    after = file_contents(tmp_path / "runs")
    assert {name: after[name] for name in before} == before, "nothing is prolonged by a list"
    compare(make("one"))  # and the comparison is as it was
    first, second = listed
    train(load_run(first, stored=True))
    assert unfinished(more) == [second]
    pair = tmp_path / "runs" / "pair"
    assert not any("is being prolonged" in note for note in verify_folder(pair).unknown)
    result = (first.parent / "result.json").rename(first.parent / "aside")
    findings = verify_folder(pair)
    assert findings.damaged == {} and any("is being prolonged" in n for n in findings.unknown)
    result.rename(first.parent / "result.json")
    folder = compare(more).parent
    long = load_compare(recipes / "one" / "pair.yaml", [f"output={tmp_path / 'long'}", "steps=3"])
    assert numbers(folder) == numbers(compare(long).parent)
    found = Comparison.load(folder / "comparison.json")
    assert all(
        "prolonged: it was planned for fewer steps" in run.notes[-1] for run in found.results
    )
    assert "prolonged: it was planned for fewer steps" in (folder / "report.md").read_text()


def test_runs_whose_schedules_were_planned_otherwise_are_refused(
    recipes: Path, tmp_path: Path
) -> None:
    """A seed that would begin with the longer plan beside one that was stretched to it."""

    def config(*overrides: str) -> CompareConfig:
        overrides = (f"output={tmp_path}", "optim.schedule=linear", *overrides)
        return load_compare(recipes / "one" / "pair.yaml", list(overrides))

    prepare(config("steps=4", "name=own", "variants.first.steps=3"))  # on purpose
    plan = prepare(config("steps=4"))
    for folder in plan.folders.values():
        (folder.checkpoints / "step-000004").mkdir(parents=True)
        (folder.checkpoints / "step-000004" / "optimizer.safetensors").touch()
    stretched = ("steps=8", "optim.resume_schedule=stretch")
    prepare(config(*stretched))
    with pytest.raises(UserError, match="their schedules would not be the same") as error:
        prepare(config(*stretched, "seeds=[0,1]"))
    assert "4 steps, stretch to 8 from step 4; 8 steps" in str(error.value)


def test_a_changed_variant_is_refused_for_what_was_changed(make: MakeCompare) -> None:
    """Not for the blocks that follow from a variant that was added."""
    with pytest.raises(UserError) as error:
        prepare(make("more", "variants.first.objectives.ra.weight=2"))
    assert (
        "first/seed-0 holds a run of another recipe (objectives.ra.weight was 1.0, is 2.0): "
        in str(error.value)
    )
