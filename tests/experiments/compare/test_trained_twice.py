"""`alignlab compare --aa`: the baseline is trained a second time, and the report says what differs.

Runs of a CPU end with the same bits.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.config.written_names import refuse_written
from alignlab.errors import UserError
from alignlab.experiments.compare import budget as budget_module
from alignlab.experiments.compare.budget import with_budget
from alignlab.experiments.compare.config import CompareConfig, dump_compare, load_compare
from alignlab.experiments.compare.result import Budget, Comparison, Cost, Ratio, VariantCost
from alignlab.experiments.compare.run import compare, prepare
from alignlab.experiments.launchers import local
from alignlab.experiments.verify import verify_folder
from alignlab.runs.checksums import read_checksums
from alignlab.train import train
from command_line import alignlab, refused
from run_contents import read_table, timeless
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeCompare = Callable[..., CompareConfig]

VARIANTS = """
cost: null
baseline: none
seeds: [0, 1]
variants:
  none: {}
  aligned: {objectives.ra: {name: refalign, teacher: dino, blocks: [0, 2]}}
"""


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparison_recipe(recipe_file, tmp_path_factory.mktemp("twice") / "pair.yaml", VARIANTS)


@pytest.fixture
def make(recipe: Path, tmp_path: Path) -> MakeCompare:
    return lambda *overrides: load_compare(recipe, [f"output={tmp_path}", *overrides])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained in this process from now on."""
    names: list[str] = []

    def noted(config: object, *args: object, **kwargs: object) -> Path:
        names.append(config.name)  # type: ignore[attr-defined]
        return train(config, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "train", noted)
    return names


def stamps(folder: Path) -> dict[Path, int]:
    files = [path for path in folder.glob("*/seed-*/**/*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def test_equal_trainings_on_a_cpu_differ_by_nothing(make: MakeCompare) -> None:
    report = compare(make("aa=true", "eval.every=1"))
    found = Comparison.load(report.with_name("comparison.json"))
    assert found.variants == ("none", "aligned") and "aa: true\n" in found.recipe
    assert {run.variant for run in found.results} == {"none", "aligned"}
    assert [run.run_dir for run in found.again] == [f"none-again/seed-{seed}" for seed in (0, 1)]
    for run in found.again:
        first = found.run("none", run.seed)
        assert first is not None
        assert timeless(run.metrics) == timeless(first.metrics)
        assert run.measured == first.measured and run.curves == first.curves
    told = "Noise floor: none trained twice ends with the same numbers with both seeds."
    assert told in report.read_text() and told in report.with_name("report.md").read_text()
    lines = read_table(report.with_name("noise_floor.csv"))
    names = {line["metric"] for line in lines}
    assert {"val/flow", "val/flow/t0", "cknna/block2", "steps_to_target"} <= names
    assert not any(name.startswith(("time/", "memory/", "params/")) for name in names)
    for line in lines:
        assert (line["largest"], line["num_equal"], line["diff_seed_1"]) == ("0.0", "2", "0.0")
    assert {line["variant"] for line in read_table(report.with_name("table.csv"))} == {
        "none",
        "aligned",
    }
    assert verify_folder(report.parent).damaged == {}
    assert "noise_floor.csv" in (read_checksums(report.parent) or {})
    with pytest.raises(ValueError, match="alignlab writes a file"):
        refuse_written("noise_floor.csv")
    (report.parent / "none-again" / "seed-1" / "result.json").unlink()
    damaged = verify_folder(report.parent).damaged
    assert any("none-again/seed-1/result.json" in str(path) for path in damaged)


def test_a_finished_comparison_gets_the_second_training_alone(
    recipe: Path, tmp_path: Path, trained: list[str]
) -> None:
    command = ["compare", recipe, f"output={tmp_path}", "seeds=[0]"]
    assert alignlab(*command).exit_code == 0
    folder, own = tmp_path / "pair", list(trained)
    before, plain = stamps(folder), Comparison.load(folder / "comparison.json")
    assert own == ["pair/none/seed-0", "pair/aligned/seed-0"] and plain.again == ()
    assert not (folder / "noise_floor.csv").exists() and "aa:" not in plain.recipe
    listed = alignlab(*command, "--aa", "--list-runs").stdout.splitlines()
    assert listed == [str(folder / "none-again" / "seed-0" / "recipe.yaml")]
    assert alignlab(*command, "--aa", "--join").exit_code == 0
    assert trained == [*own, "pair/none-again/seed-0"]
    result = alignlab(*command, "--aa")
    assert "none trained twice ends with the same numbers with seed 0" in result.stdout
    assert Comparison.load(folder / "comparison.json").results == plain.results
    assert alignlab(*command).exit_code == 0  # and without it, none of it is used
    after = stamps(folder)
    assert {path: after[path] for path in before} == before and len(trained) == 3
    found = Comparison.load(folder / "comparison.json")
    assert (found.again, found.recipe) == ((), plain.recipe)
    assert not (folder / "noise_floor.csv").exists()


def test_what_is_trained_is_listed_seed_by_seed(recipe: Path, tmp_path: Path) -> None:
    result = alignlab("compare", recipe, f"output={tmp_path}", "--aa", "--list-runs")
    names = [Path(line).parent.relative_to(tmp_path).as_posix() for line in result.stdout.split()]
    assert names == [
        f"pair/{name}/seed-{seed}" for seed in (0, 1) for name in ("none", "aligned", "none-again")
    ]


def test_a_variant_with_the_name_of_the_second_training_is_refused(recipe: Path) -> None:
    clash = "variants.none-again={optim.lr: 1e-4}"
    assert refused("compare", recipe, clash, "--aa") == (
        "error: aa: the second training of the baseline is named none-again, and so is a variant: "
        "give the variant another name\n"
    )
    assert "none-again" in load_compare(recipe, [clash]).variants
    long = "n" * 196
    assert "at most 200 bytes" in refused(
        "compare", recipe, f"variants.{long}={{}}", f"baseline={long}", "--aa"
    )


def test_a_recipe_says_that_the_baseline_is_trained_twice(recipe: Path, tmp_path: Path) -> None:
    printed = alignlab("compare", recipe, "--aa", "--print-config").stdout
    assert "aa: true\n" in printed
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert load_compare(path) == load_compare(recipe, ["aa=true"])
    assert dump_compare(load_compare(path, ["aa=false"])) == dump_compare(load_compare(recipe))
    assert "\naa:" not in dump_compare(load_compare(recipe))


def test_workers_are_told_of_the_second_training(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def noted(*_: object, command: list[str], **__: object) -> None:
        given.extend(command)
        raise UserError("enough")

    monkeypatch.setattr("alignlab.experiments.launchers.make_launcher", noted)
    assert "enough" in refused("compare", recipe, "seeds=[0]", "--aa", "--workers", "2")
    assert load_compare(recipe, given[1:]) == load_compare(recipe, ["seeds=[0]", "aa=true"])


def test_the_second_training_has_the_baselines_steps(make: MakeCompare) -> None:
    budget = Budget("compute", {"none": 1.0, "aligned": 2.0}, {"none": 7, "aligned": 3})
    config = with_budget(make("aa=true", "budget=compute", "cost={}", "steps=7"), budget)
    assert [config.run(name, 0).steps for name in config.trained] == [7, 3, 7]
    one, two = config.run("none", 1), config.run("none-again", 1)
    assert two == one.model_copy(update={"name": "pair/none-again/seed-1"})


def test_a_second_training_that_would_follow_another_plan_is_refused(
    make: MakeCompare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a budget too, under which variants are not held against each other."""
    one = VariantCost(1.0, Ratio(1.0, 1.0, 1.0), 10**9, None, 1)
    cost = Cost(6, 4, 0, "cpu", 0.0, {"none": one, "aligned": one})
    monkeypatch.setattr(budget_module, "cost_of", lambda *_: cost)
    shared = ("seeds=[0]", "budget=wall_time", "cost={}", "optim.schedule=linear")
    for folder in prepare(make(*shared, "steps=4")).folders.values():
        (folder.checkpoints / "step-000004").mkdir(parents=True)
        (folder.checkpoints / "step-000004" / "optimizer.safetensors").touch()
    stretched = (*shared, "steps=8", "optim.resume_schedule=stretch")
    prepare(make(*stretched))
    with pytest.raises(UserError, match="schedules would not be the same") as error:
        prepare(make(*stretched, "aa=true"))
    assert "none/seed-0 and" in str(error.value) and "none-again/seed-0:" in str(error.value)
