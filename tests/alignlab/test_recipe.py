"""Recipes: what is loaded, and the one line that a mistake gets."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from alignlab.config.recipe_file import recipe_folder, shipped_recipes
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import (
    CompareConfig,
    differing_settings,
    dump_compare,
    load_compare,
)
from alignlab.experiments.data_preview import load_data
from alignlab.experiments.sweep.config import SweepConfig, dump_sweep, load_sweep
from alignlab.recipe import (
    dump,
    holds_recipe,
    load_run,
    load_stage1_run,
    recipe_hash,
    shown_difference,
)
from alignlab.stage1.config import Stage1Config
from command_line import refused

Loader = Callable[[str, list[str]], RunConfig | CompareConfig | SweepConfig | Stage1Config]


def message(load: Loader, recipe: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(recipe, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load_and_load_again_from_their_dump(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = recipe_folder()
    monkeypatch.chdir(tmp_path)
    if name == "tuned_refalign":  # reads what a sweep leaves behind
        shutil.copytree(shipped.with_name("results") / "sweep_refalign", "runs/sweep_refalign")
    text = (shipped / f"{name}.yaml").read_text()
    load: Loader = load_compare if "\nvariants:" in text else load_run
    if "\nspace:" in text:
        load = load_sweep
    if "\nstage1:" in text:
        load = partial(load_stage1_run, name.split("_")[1])
    config = load(name, [])
    again = tmp_path / "again.yaml"
    match config:
        case CompareConfig():
            again.write_text(dump_compare(config))
        case SweepConfig():
            again.write_text(dump_sweep(config))
        case _:
            again.write_text(dump(config))
    assert load(str(again), []) == config
    assert shipped_recipes()[name], "the first line of a shipped recipe says what it is"


def test_recipe_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump(load_run("tiny")))
    assert load_run("tiny") == load_run(path)


def test_a_missing_file_is_no_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = "tiny.yaml: no such file; the shipped recipe of that name is 'tiny'"
    assert message(load_run, "tiny.yaml") == expected
    assert "no such file" in message(load_run, "./tiny")


def test_a_recipe_in_a_folder_is_named_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "findings").mkdir()
    text = "# Whether it holds.\n" + dump(load_run("tiny", ["steps=9"]))
    (tmp_path / "findings" / "one.yaml").write_text(text)
    monkeypatch.setattr("alignlab.config.recipe_file.recipe_folder", lambda: tmp_path)
    assert shipped_recipes() == {"findings/one": "Whether it holds."}
    assert load_run("findings/one").steps == 9
    assert "did you mean 'findings/one'" in message(load_run, "findings/on")


def test_a_file_beats_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(tmp_path / "tiny.yaml").write_text(dump(load_run("tiny", ["steps=7"])))
    monkeypatch.chdir(tmp_path)
    assert load_run("tiny.yaml").steps == 7
    assert load_run("tiny").steps != 7


def test_overrides() -> None:
    config = load_run(
        "tiny", ["steps=7", "objectives.ra.weight=0.3", "data.size=[32,48]", "optim.lr=1e-3"]
    )
    assert (config.steps, config.objectives["ra"].weight) == (7, 0.3)
    assert (config.data.size, config.optim.lr) == ((32, 48), 1e-3)


@pytest.mark.parametrize(
    ("override", "begins"),
    [
        ("objectives.ra.name=mine", "objectives.ra.name: unknown value 'mine', valid: refalign,"),
        ("data.name=mine", "data.name: unknown value 'mine', valid: shapes, folder"),
        ("teachers.dino.family=mine", "teachers.dino.family: unknown family 'mine', valid: dino"),
        ("eval.metrics=[mine]", "eval.metrics: unknown metric 'mine', valid: none defined"),
    ],
)
def test_a_name_that_a_package_had_is_said_to_be_of_none(override: str, begins: str) -> None:
    with pytest.raises(UserError) as error:
        load_run("tiny", [override])
    line = str(error.value)
    assert line.startswith(begins) and line.endswith(" (no installed package has 'mine')")


def test_a_run_whose_objective_is_not_installed_any_more_says_so(
    recipe_file: Path, tmp_path: Path
) -> None:
    """As whatever reads the run reads its recipe."""
    run = tmp_path / "run"
    run.mkdir()
    text = recipe_file.read_text()
    assert "name: refalign" in text
    (run / "recipe.yaml").write_text(text.replace("name: refalign", "name: mine"))
    line = refused("export", run)
    assert "objectives.ra.name: unknown value 'mine', valid: refalign, repa," in line
    assert "(no installed package has 'mine')" in line


def test_an_override_may_add_an_objective() -> None:
    added = ["objectives.b.name=repa", "objectives.b.teacher=dino", "objectives.b.blocks=[3]"]
    assert list(load_run("tiny", added).objectives) == ["ra", "b"]
    assert list(load_run("tiny", added[::-1]).objectives) == ["ra", "b"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("setps=3", "setps: unknown key 'setps', did you mean 'steps'? valid: name, seed, steps"),
        ("flow.shfit=3", "flow.shfit: unknown key 'shfit', did you mean 'shift'? valid: sampler"),
        (
            "objectives.ra.wieght=1",
            "objectives.ra.wieght: unknown key 'wieght', did you mean 'weight'? valid: name,",
        ),
        (
            "data.train_clip=1",
            "data.train_clip: unknown key 'train_clip', did you mean 'train_clips'?",
        ),
        ("teachers.dino.familly=x", "teachers.dino.familly: unknown key"),
        (
            "objectives.ra.schedule={kind: linear, strt: 3}",
            "objectives.ra.schedule.strt: unknown key 'strt', did you mean 'start'?",
        ),
        ("objectives.rb.weight=1", "objectives.rb: unknown alias 'rb', valid: ra"),
        ("teachers.din.path=x", "teachers.din: unknown alias 'din', did you mean 'dino'?"),
        (
            "objectives.ra.name=refalgin",
            "objectives.ra.name: unknown value 'refalgin', did you mean",
        ),
        ("data.name=shape", "data.name: unknown value 'shape', did you mean 'shapes'?"),
        (
            "model.train=ful",
            "model.train: unknown value 'ful', did you mean 'full'? valid: full, lora",
        ),
        (
            "objectives.ra.schedule=linaer",
            "objectives.ra.schedule: unknown value 'linaer', did you",
        ),
        ("steps=many", "steps: expected a whole number, got 'many'"),
        ("steps=1.5", "steps: expected a whole number, got 1.5"),
        ("steps=null", "steps: expected a whole number, got None"),
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        (
            "model.gradient_checkpointing=maybe",
            "model.gradient_checkpointing: expected true or false",
        ),
        ("objectives.ra.blocks=3", "objectives.ra.blocks: expected a list, got 3"),
        ("objectives.ra.blocks=[a]", "objectives.ra.blocks.0: expected a whole number, got 'a'"),
        ("model=3", "model: expected a mapping, got 3"),
        ("objectives.ra=3", "objectives.ra: expected a mapping, got 3"),
        ("steps=0", "steps: should be greater than or equal to 1, got 0"),
        ("optim.lr=.nan", "optim.lr: should be a finite number, got nan"),
        ("data.frames=10", "data.frames: 10 frames do not fill"),
        ("objectives.ra.teacher=dinoo", "objectives.ra.teacher: unknown teacher 'dinoo', did you"),
        ("steps", "'steps': an override reads key=value"),
        ("=3", "'=3': an override reads key=value"),
        ("optim.betas=[1", "optim.betas=[1"),
        ("data.size[0]=32", "one item of a list cannot be set; give the whole list"),
        ("data.size.0=32", "data.size: is a list; give the whole of it"),
        ("optim..lr=1", "'optim..lr': a key is made of names with single dots between"),
        (".".join("a" * 90) + "=1", "a.a.a...: more than 20 levels"),
        ("steps=!!int x", "steps=!!int x: invalid literal"),
        ("steps=!!bool x", "steps=!!bool x: "),
        ("steps=!!timestamp x", "steps=!!timestamp x: "),
        ("steps=" + "9" * 4301, "Exceeds the limit"),
        (
            "seed=0x" + "f" * 6000,
            "seed: a number of thousands of digits is more than",
        ),
        ("name=" + "[" * 200 + "]" * 200, "name="),
        ("steps=yes", "steps: expected a number, got true or false"),
        ("objectives.ra.weight=on", "objectives.ra.weight: expected a number, got true"),
        ("teachers.dino.grid=[true, 8]", "teachers.dino.grid: expected a number"),
        ("steps=1e30", "steps: a whole number too large to read, got 1e+30"),
        (
            "steps=" + "1" * 31,
            "steps: 111111111111111111111... is more than 1000000000: no",
        ),
        ("data.fps=100000", "data.fps: 100000 is more than 1000: no video has"),
        ("optim.lr=10", "optim.lr: 10 is more than 1: AdamW moves every weight by about lr a step"),
        ("optim.lr=1e300", "optim.lr: 1e+300 is more than 1: "),
        ("optim.batch_size=100000", "optim.batch_size: 100000 is more than 8192: "),
        ("optim.weight_decay=1e13", "optim.weight_decay: 1e+13 is beyond 1e+12"),
        ("tracking.log_every=" + "1" * 20, "a whole number beyond 2^53"),
        ("objectives.ra.weight=1e30", "objectives.ra.weight: 1e+30 is more than 1e+06: "),
        ("objectives.ra.neg_weight=1e30", "1e+30 is beyond 1e+12, which no setting can mean"),
        ("teachers.dino.grid=[1000000,8]", "1000000 is more than 1024: no teacher has so fine"),
        ("model={path: x, train: lora, lora: {rank: 100000}}", "100000 is more than 4096"),
        ("flow.shift=1e300", "flow.shift: 1e+300 is more than 1000: every noise level"),
        ("flow.shift=1e-300", "flow.shift: should be greater than or equal to 0.001"),
        ("data.references=[9,900]", "900 is more than 64 reference images"),
        ("data.size=[16,65536]", "65536 is more than 8192 pixels a side"),
        ("tracking.mlflow=foo://x", "'foo://x' is no place for MLflow"),
        ("tracking.mlflow=file:///x", "'file:///x' is no place for MLflow"),
        ("tracking.mlflow=http://", "'http://' is no place for MLflow"),
        ("tracking.mlflow=http://host:99999", "'http://host:99999' is no place for MLflow"),
        ("tracking.mlflow=uc://x", "'uc://x' is no place for MLflow"),
        ("model=[]", "model: expected a mapping, got []"),
        ("teachers=[]", "teachers: expected a mapping, got []"),
        ("teachers.dino.family=[]", "teachers.dino.family: expected a text, got []"),
        ('name="a\\nb"', "name: 'a\\nb' must be a folder"),
        ('model.attention="a\\0b"', "model.attention: 'a\\x00b' holds a line break or a control"),
    ],
)
def test_one_line_for_a_mistake(override: str, expected: str) -> None:
    assert expected in message(load_run, "tiny", override)


def test_a_misspelt_key_is_told_before_what_it_leaves_missing(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(dump(load_run("tiny")).replace("\nsteps:", "\nsetps:"))
    text = message(load_run, str(path))
    assert text.startswith("setps: unknown key")
    assert text.endswith("(and 1 more problem)")


def test_missing_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nsteps: 3\nmodel: {path: y}\ndata: {frames: 9}\n")
    assert message(load_run, str(path)) == "data: 'name' is missing"


def test_missing_recipe_lists_the_shipped_ones() -> None:
    text = message(load_run, "tinny")
    assert text.startswith("tinny: no such file")
    assert "did you mean 'tiny'?" in text and "demo" in text


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2\n", "", "3", "a: ${nowhere}\n", "\x00"])
def test_unreadable_recipe(content: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    assert message(load_run, str(path)).startswith(str(path))


def test_wrong_kind_of_recipe_names_the_right_command() -> None:
    assert "use `alignlab compare demo`" in message(load_run, "demo")
    assert "use `alignlab train tiny`" in message(load_compare, "tiny")


def test_compare_gives_one_run_per_variant_and_seed() -> None:
    config = load_compare("all_objectives", ["name=mine", "seeds=[3,4]", "steps=5"])
    run = config.run("refalign-no-push", 4)
    assert (run.name, run.seed, run.steps) == ("mine/refalign-no-push/seed-4", 4, 5)
    assert run.objectives["ra"].model_dump()["neg_weight"] == 0.0
    assert config.run("none", 3).objectives == {}


def compare_file(tmp_path: Path, variants: str) -> str:
    path = tmp_path / "c.yaml"
    text = dump(load_run("tiny")).replace("seed: 0\n", "", 1)
    path.write_text(f"{text}seeds: [0]\nbaseline: a\nvariants:\n{variants}")
    return str(path)


def test_a_variant_may_change_anything_by_dotted_key(tmp_path: Path) -> None:
    variants = "  a: {}\n  b: {flow.weighting: wan_gaussian, objectives: {ra: {weight: 2}}}\n"
    runs = load_compare(compare_file(tmp_path, variants)).runs
    assert differing_settings(runs) == {
        "flow.weighting": {"a": "none", "b": "wan_gaussian"},
        "objectives.ra.weight": {"a": 1.0, "b": 2.0},
    }


def test_a_variant_with_another_objective_does_not_inherit_constants(tmp_path: Path) -> None:
    variants = "  a: {}\n  b: {objectives.ra: {name: repa, teacher: dino, blocks: [3]}}\n"
    objective = load_compare(compare_file(tmp_path, variants)).runs["b"].objectives["ra"]
    assert (objective.name, objective.blocks) == ("repa", (3,))


def test_a_setting_that_one_variant_lacks_is_a_difference() -> None:
    runs = load_compare("all_objectives").runs
    table = differing_settings(runs)
    expected = dict.fromkeys(runs) | {"refalign": 1.0, "refalign-no-push": 0.0}
    assert table["objectives.ra.neg_weight"] == expected
    assert "steps" not in table and "name" not in table


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seeds=[0,0]", "seeds: [0, 0] names a seed twice"),
        ("seeds=[4294967296]", "seeds.0: 4294967296 is more than 4294967295: NumPy"),
        ("cost.rounds=100000", "cost.rounds: should be less than or equal to 10000"),
        ("seeds=[]", "seeds: name at least one seed"),
        ("baseline=nonee", "baseline: unknown variant 'nonee', did you mean 'none'?"),
        ("seed=3", "seed: a comparison reads 'seeds'"),
        ("variants.none.seed=3", "variants.none.seed: the comparison sets it"),
        ("variants.none=3", "variants.none: expected a mapping"),
        ("variants=3", "variants: expected a mapping"),
        ("variants.a/b={steps: 3}", "variants: 'a/b' holds '/'"),
        ("variants.nonee.steps=3", "unknown variant 'nonee', did you mean 'none'?"),
        (
            "objectives.ra.weight=3",
            "belongs to variants (refalign, refalign-no-push): override variants.refalign.",
        ),
        (
            "variants.repa.objectives.repa.wight=3",
            "variants.repa.objectives.repa.wight: unknown key",
        ),
        (
            "variants.repa.objectives.repa.teacher=x",
            "variants.repa.objectives.repa.teacher: unknown",
        ),
        ("steps=0", "steps: should be greater"),
    ],
)
def test_one_line_for_a_mistake_in_a_comparison(override: str, expected: str) -> None:
    assert expected in message(load_compare, "all_objectives", override)


def test_missing_comparison_key(tmp_path: Path) -> None:
    path = compare_file(tmp_path, "  a: {}\n")
    Path(path).write_text(Path(path).read_text().replace("baseline: a\n", ""))
    assert message(load_compare, path).startswith("baseline: missing")


def test_data_of_either_kind_of_recipe() -> None:
    data, output = load_data("tiny", ["data.frames=13", "output=somewhere"])
    assert data.frames == 13 and output == Path("somewhere")
    assert load_data("demo")[0].name == "shapes"


def test_hash_ignores_what_changes_no_number() -> None:
    config = load_run("tiny")
    same = ["name=other", "output=elsewhere", "tracking.log_every=3", "data.cache.path=x"]
    assert recipe_hash(config) == recipe_hash(load_run("tiny", [*same, "checkpoint.every=3"]))
    assert recipe_hash(config).startswith("v2-")


@pytest.mark.parametrize("override", ["seed=1", "steps=3", "objectives.ra.weight=2", "data.fps=4"])
def test_hash_tells_runs_apart(override: str) -> None:
    assert recipe_hash(load_run("tiny")) != recipe_hash(load_run("tiny", [override]))


def test_another_order_of_objectives_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    config = load_run("tiny", ["objectives.b={name: repa, teacher: dino, blocks: [3]}"])
    path.write_text(dump(config))
    swapped = config.model_copy(update={"objectives": dict(reversed(config.objectives.items()))})
    assert holds_recipe(path, config) and not holds_recipe(path, swapped)
    assert shown_difference(path, swapped) == "objectives were in the order ra, b, are in b, ra"


def test_a_new_objective_on_the_command_line_has_its_own_defaults() -> None:
    config = load_run("tiny", ["objectives.ra={name: repa, teacher: dino, blocks: [3]}"])
    assert list(config.objectives) == ["ra"]
    assert (config.objectives["ra"].name, config.objectives["ra"].weight) == ("repa", 0.5)
    assert load_run("tiny", ["objectives={}"]).objectives == {}
    assert load_run("tiny", ["objectives.ra=null"]).objectives == {}


@pytest.mark.parametrize("nothing", ["{objectives: {}}", "{objectives: null}", "{objectives.ra: }"])
def test_a_variant_may_have_no_objective(nothing: str, tmp_path: Path) -> None:
    config = load_compare(compare_file(tmp_path, f"  a: {nothing}\n  b: {{}}\n"))
    assert config.runs["a"].objectives == {} and config.runs["b"].objectives
    again = tmp_path / "again.yaml"
    again.write_text(dump_compare(config))
    assert load_compare(again) == config


def test_overrides_of_a_variant_come_after_its_own_changes(tmp_path: Path) -> None:
    path = compare_file(tmp_path, "  a: {objectives.ra.weight: 3}\n  b-1.5: {objectives: {}}\n")
    weight = load_compare(path, ["variants.a.objectives.ra.weight=5"]).runs["a"].objectives["ra"]
    assert weight.weight == 5
    added = "variants.b-1.5.objectives.r={name: repa, teacher: dino, blocks: [3]}"
    assert list(load_compare(path, [added]).runs["b-1.5"].objectives) == ["r"]
    assert list(load_compare(path, ["variants.b-1.5=null"]).runs) == ["a"]
    assert load_compare(path, ["variants.b-1.5={}"]).runs["b-1.5"].objectives
    assert list(load_compare(path, ["variants.c={steps: 2}"]).runs) == ["a", "b-1.5", "c"]


def test_a_grid_of_variants(tmp_path: Path) -> None:
    grid = (
        "  a: {}\n  grid: {objectives.ra.weight: [0.1, 2], objectives.ra.blocks: [[0], [0, 1]]}\n"
    )
    config = load_compare(compare_file(tmp_path, grid))
    points = {name: run.objectives["ra"] for name, run in config.runs.items()}
    assert list(points)[1:] == [
        "weight-0.1_blocks-0",
        "weight-0.1_blocks-0-1",
        "weight-2_blocks-0",
        "weight-2_blocks-0-1",
    ]
    assert points["weight-2_blocks-0-1"].weight == 2
    assert points["weight-2_blocks-0-1"].blocks == (0, 1)
    again = tmp_path / "again.yaml"
    again.write_text(dump_compare(config))
    assert load_compare(again) == config
    wider = load_compare(compare_file(tmp_path, grid), ["variants.grid.steps=[1,2]"])
    assert len(wider.runs) == 9


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("{}", "variants.grid: names no setting"),
        ("{steps: 3}", "variants.grid.steps: expected a list of the setting's values, got 3"),
        ("{steps: []}", "variants.grid.steps: expected a list"),
        ("{steps: [1, 1]}", "'steps-1' stands there twice"),
        (f"{{steps: {list(range(1, 1002))}}}", "more than 1000 are a sweep's"),
    ],
)
def test_a_grid_that_cannot_be_meant(grid: str, expected: str, tmp_path: Path) -> None:
    assert expected in message(load_compare, compare_file(tmp_path, f"  a: {{}}\n  grid: {grid}\n"))
