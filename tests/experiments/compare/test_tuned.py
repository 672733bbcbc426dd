"""Tuned against tuned: variants that take the best recipe of a sweep of their own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, dump_compare, load_compare
from alignlab.experiments.compare.fairness import check_fair, tuning_facts
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.compare.run import compare, prepare
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.run import sweep
from alignlab.recipe import load_run
from alignlab.runs.checksums import read_json, write_json
from small_recipes import comparison_recipe, sweep_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

Make = Callable[..., CompareConfig]

SPACE = """
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
metric: val/flow
trials: 2
"""
VARIANTS = """
baseline: none
seeds: [0]
cost: null
variants:
  none: {}
  tuned: {%s}
"""


@pytest.fixture(scope="module")
def swept(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep of two trials; not to be changed."""
    folder = tmp_path_factory.mktemp("sweeps")
    recipe = sweep_recipe(recipe_file, folder / "ra.yaml", SPACE)
    sweep(load_sweep(recipe, [f"output={folder}"]))
    return folder / "ra"


@pytest.fixture
def folder(swept: Path, tmp_path: Path) -> Path:
    """A copy of what the sweep wrote."""
    copy = tmp_path / "ra"
    copy.mkdir()
    for name in ("best.yaml", "recipe.yaml", "trials.csv"):
        shutil.copy(swept / name, copy)
    return copy


@pytest.fixture
def make(recipe_file: Path, folder: Path, tmp_path: Path) -> Make:
    """`make("...", "key=value")`: a baseline and a variant with these changes."""

    def config(changes: str = f"from: {folder}/best.yaml", *overrides: str) -> CompareConfig:
        path = comparison_recipe(recipe_file, tmp_path / "fair.yaml", VARIANTS % changes)
        return load_compare(path, [f"output={tmp_path}", *overrides])

    return config


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, text
    path.write_text(text.replace(old, new))


def test_the_variant_is_the_sweeps_best_run(make: Make, folder: Path, tmp_path: Path) -> None:
    config, best = make(), load_run(folder / "best.yaml")
    run = config.run("tuned", 0)
    assert run.objectives == best.objectives and run.optim == config.base.optim
    again = tmp_path / "again.yaml"
    again.write_text(dump_compare(config))
    assert load_compare(again) == config

    report = compare(config)
    found = Comparison.load(report.parent / "comparison.json")
    tuned = found.run("tuned", 0)
    assert tuned is not None
    value = tuned.metrics["val/flow"]
    assert f"val/flow {value!r}" in (folder / "best.yaml").read_text().split("\n")[0]
    source = str(folder / "best.yaml")
    assert found.tuning["tuning.trials"] == {"none": None, "tuned": 2}
    assert found.tuning["tuning.sweep"] == {"none": None, "tuned": source}
    for name in ("report.html", "report.md"):
        text = (report.parent / name).read_text()
        assert "tuning.trials" in text and "ra/best.yaml" in text.replace("\\", "")


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("eval.clips", "trials would be measured differently"),
        ("data.seed", "trials would be measured differently"),
        ("seed", "every trial trains with the sweep's `seeds`"),
        ("tracking.log_every", "changes no number of a trial"),
        ("steps", "the comparison sets them for all variants alike"),
    ],
)
def test_a_sweep_over_what_no_variant_may_take_is_refused(
    make: Make, folder: Path, key: str, why: str
) -> None:
    """As an older version let it be searched."""
    check_fair(make())
    section, _, name = key.rpartition(".")
    searched = f"  {section or name}:\n" + (f"    {name}:\n" if section else "")
    searched += "      kind: int\n      low: 1\n      high: 2\n"
    edit(folder / "recipe.yaml", "space:\n", f"space:\n{searched}")
    with pytest.raises(UserError) as caught:
        check_fair(make())
    assert str(caught.value).startswith(
        f"variants.tuned.from: {folder}/best.yaml searched {key}: {why}"
    )
    assert "\n" not in str(caught.value)


def test_what_the_variant_changes_itself_comes_on_top(make: Make, folder: Path) -> None:
    source = f"from: {folder}/best.yaml"
    run = make(f"{source}, objectives.ra.neg_weight: 0.0").run("tuned", 0)
    best = load_run(folder / "best.yaml").objectives["ra"]
    assert run.objectives["ra"] == best.model_copy(update={"neg_weight": 0.0})


def test_sweeps_of_unequal_size_are_refused_before_training(
    make: Make, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    rows = (other / "trials.csv").read_text()
    (other / "trials.csv").write_text(rows + rows.splitlines()[-1].replace("1,", "2,", 1) + "\n")
    second = f"variants.second={{from: {other}/best.yaml}}"
    with pytest.raises(UserError) as caught:
        compare(make(f"from: {folder}/best.yaml", second))
    assert str(caught.value).startswith(
        "tuning.trials: variants are tuned differently (tuned: 2, second: 3); make it equal or "
    )
    assert "\n" not in str(caught.value) and not (tmp_path / "fair").exists()
    allowed = make(f"from: {folder}/best.yaml", second, "allow_differences=[tuning.trials]")
    check_fair(allowed)
    assert tuning_facts(allowed)["tuning.trials"] == {"none": None, "tuned": 2, "second": 3}
    (other / "trials.csv").write_text(rows)
    check_fair(make(f"from: {folder}/best.yaml", second))
    with pytest.raises(UserError, match=r"unknown difference 'tuning\.trials'"):
        check_fair(make(f"from: {folder}/best.yaml", second, "allow_differences=[tuning.trials]"))


def test_an_untuned_variant_beside_a_tuned_one_is_refused(make: Make, folder: Path) -> None:
    untuned = "variants.plain={objectives: {ra: {name: refalign, teacher: dino, blocks: [0]}}}"
    with pytest.raises(UserError, match=r"tuned differently \(tuned: 2, plain: 0\)"):
        check_fair(make(f"from: {folder}/best.yaml", untuned))


def test_the_baseline_needs_a_sweep_where_its_own_settings_were_searched(
    make: Make, folder: Path
) -> None:
    check_fair(make())
    lr = "space:\n  optim.lr: {kind: float, low: 1.0e-4, high: 1.0e-2}\n"
    edit(folder / "recipe.yaml", "space:\n", lr)
    edit(folder / "best.yaml", "  lr: 0.001", "  lr: 0.002")
    config = make()
    assert config.run("tuned", 0).optim.lr == 0.002 and config.run("none", 0).optim.lr == 0.001
    with pytest.raises(UserError, match=r"tuned differently \(none: 0, tuned: 2\)"):
        check_fair(config)


def test_trials_of_another_kind_are_refused(make: Make, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    edit(other / "recipe.yaml", "steps: 2", "steps: 5")
    edit(other / "best.yaml", "steps: 2", "steps: 5")
    second = f"variants.second={{from: {other}/best.yaml}}"
    config = make(f"from: {folder}/best.yaml", second)
    assert config.run("second", 0).steps == 2, "the steps are the comparison's"
    with pytest.raises(UserError, match=r"tuning\.steps: .* \(tuned: 2, second: 5\)"):
        check_fair(config)


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        (
            "best.yaml",
            "  batch_size: 2\n  warmup",
            "  batch_size: 4\n  warmup",
            "optim.batch_size 4",
        ),
        (
            "best.yaml",
            "feature: post_norm",
            "feature: pre_norm",
            "teachers.dino.feature 'pre_norm'",
        ),
        ("best.yaml", "train_clips: 6", "train_clips: 5", "data.train_clips 5"),
    ],
)
def test_other_settings_than_the_comparisons_are_refused(
    make: Make, folder: Path, file: str, old: str, new: str, named: str
) -> None:
    edit(folder / file, old, new)
    with pytest.raises(UserError) as caught:
        make()
    assert f"best.yaml was tuned with {named}, this comparison has " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_difference_that_the_variant_names_is_its_own(make: Make, folder: Path) -> None:
    edit(folder / "best.yaml", "  batch_size: 2\n  warmup", "  batch_size: 4\n  warmup")
    run = make(f"from: {folder}/best.yaml, optim.batch_size: 2").run("tuned", 0)
    assert run.optim.batch_size == 2


def test_a_teacher_that_only_the_sweep_has_comes_along(make: Make, folder: Path) -> None:
    edit(folder / "best.yaml", "  dino:\n", "  own:\n")
    edit(folder / "best.yaml", "teacher: dino", "teacher: own")
    run = make().run("tuned", 0)
    assert list(run.teachers) == ["dino", "own"] and run.objectives["ra"].teachers == ("own",)
    check_fair(make())


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("best.yaml", r"variants\.tuned\.from: .*best\.yaml: no such file"),
        ("trials.csv", r"best\.yaml is not in a sweep's folder: no trials\.csv beside it"),
        ("recipe.yaml", r"best\.yaml is not in a sweep's folder: no recipe\.yaml beside it"),
    ],
)
def test_what_is_no_sweep_is_refused(make: Make, folder: Path, removed: str, named: str) -> None:
    (folder / removed).unlink()
    with pytest.raises(UserError, match=named):
        make()
    with pytest.raises(UserError, match=r"variants\.tuned\.from: expected the path"):
        make("from: [1]")


def test_a_sweep_on_other_files_is_refused(swept: Path, folder: Path, make: Make) -> None:
    record = read_json(swept / "inputs.json", fix="")
    write_json(folder / "inputs.json", record)
    prepare(make())
    vae = next(one for one in record["inputs"] if one["name"] == "model/vae")
    vae["digest"] = "0" * 64
    write_json(folder / "inputs.json", record)
    with pytest.raises(
        UserError, match=f"{folder}: model/vae changed since variant tuned was tuned"
    ):
        prepare(make())


def test_the_folder_of_a_sweep_in_place_of_its_best_recipe_is_named(
    make: Make, folder: Path
) -> None:
    with pytest.raises(UserError) as caught:
        make(f"from: {folder}")
    said = f"{folder} is the folder of a run: name {folder}/best.yaml"
    assert str(caught.value) == f"variants.tuned.from: {said}"
