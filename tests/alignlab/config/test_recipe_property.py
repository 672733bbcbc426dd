"""Any mapping that looks like a recipe either loads or is refused in one line.

`ALIGNLAB_EXAMPLES=10000 pytest tests/alignlab/config/test_recipe_property.py` tries more of them.
"""

import datetime
import os
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, dump_compare, load_compare
from alignlab.experiments.sweep.config import Parameter, SweepConfig, dump_sweep, load_sweep
from alignlab.losses import OBJECTIVES
from alignlab.recipe import dump, load_run
from alignlab.teachers import TEACHERS

EXAMPLES = int(os.environ.get("ALIGNLAB_EXAMPLES", "150"))
# So that not all are refused before anything is looked at: 25 to 42 % of 150 load, by the seed.
MIN_LOADED = 0.1

# What a validator demands beyond the type, by the setting's name.
SOUND: dict[str, st.SearchStrategy[Any]] = {
    "frames": st.sampled_from([9, 13, 17]),
    "size": st.sampled_from([[64, 64], [32, 48]]),
    "references": st.sampled_from([[0, 3], [2, 3], [1, 1]]),
    "family": st.sampled_from(sorted(TEACHERS)),
    "feature": st.sampled_from([None, "post_norm", "layer:0"]),
    "blocks": st.sampled_from([[0], [1, 2], [0, 1, 2, 3]]),
    "block": st.sampled_from([0, 3]),
    "teacher": st.just("dino"),
    "mlflow": st.sampled_from(["sqlite", "none", "http://host:5000"]),
    "path": st.sampled_from(["assets/tiny-wan", "assets/tiny-dino"]),
    "clips": st.just(1),
    "sample_clips": st.just(0),
    "generated_clips": st.just(1),
    "val_clips": st.integers(4, 9),
    "text_dropout": st.floats(0, 0.3),
    "reference_dropout": st.floats(0, 0.3),
    "both_dropout": st.floats(0, 0.3),
    "low": st.sampled_from([1, 2]),
    "high": st.sampled_from([2, 3]),
    "choices": st.sampled_from([[0.1], [0.1, 0.2]]),
    "betas": st.just([0.9, 0.99]),
    "gate": st.sampled_from(["none", "t^3", {"kind": "window", "low": 0.1, "high": 0.5}]),
    "schedule": st.sampled_from(["constant", "linear"]),
}
# Settings that others may make unread: left out of most recipes.
SELDOM = {"logit_mean", "logit_std", "shift", "accumulate", "lora", "saliency", "tau", "routing"}
SELDOM |= {"noise_level", "caption", "centred"}
ODD_TEXTS = [
    "",
    "x",
    "\x00",
    "a\nb",
    "${nowhere}",
    "${seed}",
    "${",
    "???",
    "é🙂",
    "\ud800",
    "1_0",
    "on",
]
ODD_NUMBERS = [-1, 0, 1.5, 1e300, -1e300, 1e-300, 10**40, 2**64, float("nan"), float("inf")]
ODD = st.one_of(
    st.sampled_from([None, True, False, *ODD_TEXTS, *ODD_NUMBERS, b"bytes"]),
    st.sampled_from([[], {}, [[]], [{}], {"a": 1}, {"name": "zzz"}, {"name": []}, {1: 2}]),
    st.just(datetime.date(2026, 1, 1)),
    st.integers(3, 60).map(lambda depth: _nested(depth)),
)
ODD_KEYS = st.sampled_from(
    ["setps", "", ".", "a..b", "optim.lr", "objectives.ra.weight", "a.b", "é"]
)


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def bounds(field: FieldInfo) -> tuple[float, float]:
    """Smallest and largest sound number of a setting."""
    low, high = 0.0, 4.0
    for limit in field.metadata:
        step = 0.01
        low = max(low, getattr(limit, "ge", None) or 0.0, (getattr(limit, "gt", None) or 0) + step)
        for key in ("le", "lt"):
            if getattr(limit, key, None) is not None:
                high = min(high, getattr(limit, key) - (step if key == "lt" else 0))
    return low, max(low, high)


def sound(name: str, annotation: Any, field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values that a setting of this name and type takes."""
    if name in SOUND:
        return SOUND[name]
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, UnionType):
        inner = [a for a in args if a is not type(None)]
        values = st.one_of([sound(name, a, field) for a in inner])
        return st.none() | values if type(None) in args else values
    if origin is tuple:
        one = sound("", args[0], field)
        return st.lists(one, min_size=1, max_size=2) if Ellipsis in args else st.tuples(one, one)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return mapping(annotation)
    low, high = bounds(field)
    return {
        bool: st.booleans(),
        int: st.integers(int(-(-low // 1)), max(int(-(-low // 1)), int(high))),
        float: st.floats(low, high),
        str: st.sampled_from(["a", "some-name"]),
    }.get(annotation, st.just({}))


@st.composite
def mapping(draw: st.DrawFn, model: type[BaseModel], chance: int = 6) -> dict[str, Any]:
    """Settings of a model: the required ones, and one in `chance` of the others."""
    settings: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        tag = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        required = tag or (field.default is PydanticUndefined and field.default_factory is None)
        odds = 20 * chance if name in SELDOM else chance
        if required or draw(st.integers(1, odds)) == 1:
            settings[name] = draw(sound(name, field.annotation, field))
    return settings


@st.composite
def run_recipe(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe of one run, sound but for the odds of its validators."""
    left_out = {"objectives", "teachers", "data"}
    recipe = draw(mapping(RunConfig, 3))
    recipe = {key: value for key, value in recipe.items() if key not in left_out}
    recipe["data"] = draw(mapping(draw(st.sampled_from(_data_models()))))
    recipe["teachers"] = {"dino": {"family": "dinov2"}} | draw(
        st.dictionaries(st.just("b"), mapping(_field_model("teachers")), max_size=1)
    )
    rows = st.sampled_from([row.Config for row in OBJECTIVES.values()])
    recipe["objectives"] = draw(
        st.dictionaries(st.sampled_from(["ra", "b"]), rows.flatmap(mapping), max_size=2)
    )
    return recipe


def _data_models() -> list[type[BaseModel]]:
    return [
        arg
        for arg in get_args(RunConfig.model_fields["data"].annotation)
        if isinstance(arg, type) and issubclass(arg, BaseModel)
    ]


def _field_model(name: str) -> type[BaseModel]:
    model: type[BaseModel] = get_args(RunConfig.model_fields[name].annotation)[1]
    return model


@st.composite
def recipe(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe of a run, a comparison or a sweep; some with odd places."""
    content = draw(run_recipe())
    kind = draw(st.sampled_from(["run", "run", "compare", "sweep"]))
    if kind == "compare":
        content.pop("seed", None)
        names = st.sampled_from(["a", "b", "grid"])
        changes = draw(st.dictionaries(names, _changes(), max_size=2))
        content |= {"baseline": "none", "seeds": [0, 1], "variants": {"none": {}, **changes}}
    if kind == "sweep":
        content.pop("seed", None)
        space = {draw(SPACES): draw(sound("", Parameter, FieldInfo()))}
        content |= {"space": space, "metric": "val/flow", "trials": 2}
    if draw(st.integers(1, 6)) == 1:
        for _ in range(draw(st.integers(1, 2))):
            _spoil(draw, content)
    return content


def _changes() -> st.SearchStrategy[dict[str, Any]]:
    keys = st.sampled_from(
        ["optim.lr", "steps", "objectives", "objectives.ra", "flow", "eval.blocks"]
    )
    values = st.sampled_from([{}, None, 1, 0.01, [1, 2], {"weight": 2}, {"shift": 3}])
    return st.dictionaries(keys, values, max_size=2)


def _spoil(draw: st.DrawFn, content: dict[Any, Any]) -> None:
    """Put something odd somewhere."""
    here = content
    while draw(st.booleans()):
        inner = [value for value in here.values() if isinstance(value, dict)]
        if not inner:
            break
        here = draw(st.sampled_from(inner))
    if here and draw(st.integers(1, 4)) > 1:
        here[draw(st.sampled_from(sorted(here, key=str)))] = draw(ODD)
    else:
        here[draw(ODD_KEYS)] = draw(ODD)


SPACES = st.sampled_from(["optim.lr", "optim.warmup", "objectives.ra.weight"])
OVERRIDE_KEYS = ["optim.lr", "objectives", "objectives.ra", "data", "variants.a.steps", "a[0]"]
OVERRIDE_TEXTS = ["1", "{}", "null", "[1", "!!int x", "9" * 4301, "{name: repa}", "${x}", "~"]
OVERRIDES = st.lists(
    st.tuples(st.sampled_from(OVERRIDE_KEYS) | ODD_KEYS, st.sampled_from(OVERRIDE_TEXTS)).map(
        "=".join
    ),
    max_size=2,
)


def _overrides(without: bool) -> st.SearchStrategy[list[str]]:
    return st.just([]) if without else OVERRIDES


def load_and_again(content: dict[str, Any], overrides: list[str], folder: Path) -> bool:
    """Whether a recipe loads; what loads is the same after a dump."""
    path, again = folder / "recipe.yaml", folder / "again.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    load: Any = load_run
    if "variants" in content:
        load = load_compare
    elif "space" in content:
        load = load_sweep
    try:
        config = load(path, overrides)
    except UserError as error:
        text = str(error)
        assert text and text.isprintable(), text
        return False
    match config:
        case CompareConfig():
            again.write_text(dump_compare(config), encoding="utf-8")
        case SweepConfig():
            again.write_text(dump_sweep(config), encoding="utf-8")
        case _:
            again.write_text(dump(config), encoding="utf-8")
    assert load(again) == config
    return True


def test_recipes_load_or_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("recipes")
    loaded = []

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(recipe(), st.sampled_from([True] * 5 + [False]).flatmap(_overrides))
    def check(content: dict[str, Any], overrides: list[str]) -> None:
        loaded.append(load_and_again(content, overrides, folder))

    check()
    share = sum(loaded) / len(loaded)
    print(f"{len(loaded)} recipes, {share:.0%} loaded")
    assert share >= MIN_LOADED
