"""The settings that `alignlab list settings` shows: all of them, with a meaning and a default."""

import json
from typing import get_args

import pytest
from pydantic import BaseModel

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import COMPARE_KEYS, OPTIONAL_COMPARE_KEYS, CompareConfig
from alignlab.experiments.recipe_settings import named_settings, recipe_settings
from alignlab.experiments.sweep.config import SWEEP_KEYS, SweepConfig
from alignlab.losses import OBJECTIVES
from alignlab.recipe import load_run
from alignlab.stage1.config import Stage1Config
from alignlab.teachers import TEACHERS
from command_line import alignlab, refused


def classes_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for argument in get_args(annotation) for one in classes_in(argument)]


def fields_below(config: type[BaseModel], seen: set[type[BaseModel]]) -> set[tuple[str, str]]:
    """Class and name of every field that a recipe of this class may have."""
    if config in seen:
        return set()
    seen.add(config)
    fields = set()
    for name, field in config.model_fields.items():
        fields.add((config.__name__, name))
        for inner in classes_in(field.annotation):
            fields |= fields_below(inner, seen)
    return fields


def test_every_field_of_every_config_is_listed_with_a_meaning() -> None:
    seen: set[type[BaseModel]] = {CompareConfig, SweepConfig}
    expected = fields_below(RunConfig, seen) | fields_below(Stage1Config, seen)
    for config, keys in (
        (CompareConfig, (*COMPARE_KEYS, *OPTIONAL_COMPARE_KEYS)),
        (SweepConfig, SWEEP_KEYS),
    ):
        for key in keys:
            expected.add((config.__name__, key))
            for inner in classes_in(config.model_fields[key].annotation):
                expected |= fields_below(inner, seen)
    settings = recipe_settings()
    last_parts = {setting.row.name.split(".")[-1] for setting in settings}
    assert {name for _, name in expected} <= last_parts
    assert len(expected) > 200
    assert [setting.row.name for setting in settings if not setting.row.meaning] == []


def test_a_default_is_what_a_recipe_without_the_setting_trains_with() -> None:
    config = load_run(
        "tiny", ["objectives={r: {name: repa, teacher: dino}}", "optim={}", "flow={}"]
    )
    resolved = config.model_dump(mode="json")
    rows = {setting.row.name: setting.row for setting in named_settings("optim")}
    rows |= {setting.row.name: setting.row for setting in named_settings("flow")}
    rows |= {setting.row.name: setting.row for setting in named_settings("objectives.repa")}
    for section in ("optim", "flow"):
        for key, value in resolved[section].items():
            assert rows[f"{section}.{key}"].default == value, key
    for key, value in resolved["objectives"]["r"].items():
        if key != "teacher":
            assert rows[f"objectives.repa.{key}"].default == value, key
    assert rows["objectives.repa.teacher"].required


def test_objectives_and_families_of_teachers_stand_under_their_names() -> None:
    rows = {setting.row.name: setting.row for setting in recipe_settings()}
    for name, objective in OBJECTIVES.items():
        for key in objective.Config.model_fields:
            assert rows[f"objectives.{name}.{key}"].when == f"name: {name}"
    for family, teacher in TEACHERS.items():
        assert rows[f"teachers.{family}.path"].default == teacher.path
    assert rows["objectives.refalign.neg_weight"].meaning.startswith("factor on the push")
    assert rows["teachers.diffusion.noise_level"].default == 0.1


def test_a_setting_says_which_recipes_read_it() -> None:
    recipes = {setting.row.name: setting.recipes for setting in recipe_settings()}
    assert recipes["optim.lr"] == ("run", "comparison", "sweep", "stage1")
    assert recipes["optim.ema"] == ("run", "comparison", "sweep")
    assert recipes["launch.gpus"] == ("comparison", "sweep")
    assert recipes["seed"] == ("run", "sweep", "stage1")
    assert "stage1" not in recipes["teachers.ALIAS.shuffle"]


def test_a_recipes_own_names_fit_where_the_listed_name_has_capitals() -> None:
    assert [s.row.name for s in named_settings("teachers.dino.grid")] == ["teachers.ALIAS.grid"]
    names = {setting.row.name for setting in named_settings("objectives.refalign")}
    assert {"objectives.refalign.pos_margin", "objectives.ALIAS.gate.p"} <= names
    assert not any(name.startswith("objectives.repa") for name in names)


@pytest.mark.parametrize(
    ("prefix", "nearest"),
    [("optin", "optim"), ("lr", "optim.lr"), ("objectives.refaling", "objectives.refalign")],
)
def test_an_unknown_prefix_names_the_nearest(prefix: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"{prefix}.*no setting begins with it.* {nearest}"):
        named_settings(prefix)
    assert nearest in refused("list", "settings", prefix)


def test_settings_are_printed_with_type_default_and_meaning() -> None:
    result = alignlab("list", "settings", "optim")
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if "optim.grad_clip" in line)
    assert [cell.strip() for cell in line.split("│")[2:4]] == ["number or null", "1.0"]
    assert "Largest norm of the whole gradient" in line
    assert "model.path" not in result.stdout


LISTS = ("objectives", "teachers", "metrics", "recipes", "data", "settings")


@pytest.mark.parametrize("what", LISTS)
def test_lists_as_json_are_nothing_but_json(what: str) -> None:
    result = alignlab("list", what, "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    keys = [tuple(row) for row in rows]
    assert len(rows) > 1 and len(set(keys)) == 1 and keys[0][0] == "name"


def test_a_data_set_as_json_has_its_settings() -> None:
    rows = json.loads(alignlab("list", "data", "--json").stdout)
    shapes = next(row for row in rows if row["name"] == "shapes")
    frames = next(row for row in shapes["settings"] if row["name"] == "data.frames")
    assert frames["default"] == 9 and frames["type"] == "integer" and not frames["required"]
