"""Recipe files as plain mappings: looked up, read, overridden. Nothing here knows the settings.

A mistake raises `alignlab.errors.UserError` with one line.
"""

import copy
import importlib.util
import io
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from alignlab.config.data import unknown_name
from alignlab.config.merging import ALIASED, KINDS, canonical, merge
from alignlab.config.path_kinds import not_a_recipe
from alignlab.config.paths import user_path
from alignlab.errors import UserError, one_line

# Besides its own errors, YAML lets through what Python raises on odd numbers, dates and tags
# (`!!int x`), and both libraries recurse into what is nested too deep.
UNREADABLE = (
    YAMLError,
    OmegaConfBaseException,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
)


# Shipped recipes that were renamed, and what took their place.
_FORMER = {
    "wan21_1.3b": "wan21_1.3b_8gpu (the same settings, for eight GPUs) or wan21_1.3b_1gpu (one); "
    "to resume a run of it, add name=wan21_1.3b",
}


def shipped_recipes() -> dict[str, str]:
    """Name -> one line of description of every recipe that comes with alignlab.

    A recipe in a sub-folder is named with it, such as `findings/NAME`.
    """
    recipes = {}
    folder = recipe_folder()
    for file in sorted(folder.rglob("*.yaml")):
        first = file.read_text(encoding="utf-8").split("\n", 1)[0]
        name = file.relative_to(folder).with_suffix("").as_posix()
        recipes[name] = first.removeprefix("#").strip()
    return recipes


def read_recipe(recipe: str | Path, overrides: list[str]) -> dict[str, Any]:
    """The recipe as plain nested dicts, overrides applied and `${...}` resolved.

    The changes of each variant stay as `alignlab.config.merging.canonical` gives them.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe.
        overrides: `dotted.key=value` strings.

    Raises:
        UserError: no such recipe, not YAML, an override that cannot be meant.
    """
    path = _find(recipe)
    content = _read(path)
    changes = [_parsed(override) for override in overrides]
    for key, value in changes:
        if key == "variants":
            content["variants"] = _canonical_members(value)
        elif key.startswith("variants.") and isinstance(content.get("variants"), dict):
            _override_member(content["variants"], key.removeprefix("variants."), value)
    shared = [{key: value} for key, value in changes if key.split(".")[0] != "variants"]
    _check_aliases([key for change in shared for key in change], content)
    content = merge(content, *shared)
    try:
        # a reference is all that OmegaConf would change: without one, its tree is not built again
        if not _has_reference(content):
            return content
        resolved = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except UNREADABLE as error:
        raise UserError(f"{path} {' '.join(overrides)}: {one_line(error)}") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _has_reference(value: Any) -> bool:
    """Whether a text in it has a `${...}`."""
    if isinstance(value, dict):
        return any(map(_has_reference, value.values()))
    if isinstance(value, list):
        return any(map(_has_reference, value))
    return isinstance(value, str) and "${" in value


def _find(recipe: str | Path) -> Path:
    path = user_path(str(recipe))
    problem = not_a_recipe(path)
    if path.is_file() and problem is None:
        return path
    shipped = shipped_recipes()
    name = str(recipe).removesuffix(".yaml")
    if name in shipped:
        if str(recipe) != name:  # a file was meant, and this run would be of other settings
            raise UserError(f"{recipe}: no such file; the shipped recipe of that name is {name!r}")
        return recipe_folder() / f"{name}.yaml"
    if problem is not None:
        raise UserError(problem)
    if name in _FORMER:
        raise UserError(f"{recipe}: that recipe is now {_FORMER[name]}")
    raise UserError(f"{recipe}: no such file; {unknown_name('shipped recipe', name, shipped)}")


def recipe_folder() -> Path:
    """Where the shipped recipes lie."""
    # A lookup, not an import: the harness knows the folder of recipes, not the room's code.
    spec = importlib.util.find_spec("alignlab.experiments")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "recipes"


def _read(path: Path) -> dict[str, Any]:
    """What a recipe file holds, variants and all else in one form."""
    try:
        content = copy.deepcopy(_loaded(str(path), path.read_text(encoding="utf-8")))
    except (*UNREADABLE, OSError) as error:
        raise UserError(f"{path}: not a readable YAML file: {one_line(error)}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    members = content.pop("variants", None)
    try:
        settings = merge({}, {str(key): value for key, value in content.items()})
        if members is not None:
            settings["variants"] = _canonical_members(members)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return settings


@lru_cache(maxsize=32)
def _loaded(path: str, text: str) -> Any:
    """What is written in a file. A command reads its recipe several times, for 20 ms each."""
    return OmegaConf.to_container(OmegaConf.load(_Named(path, text)))


class _Named(io.StringIO):
    """A text that YAML's messages name by its file."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(text)
        self.name = path


def _canonical_members(members: Any) -> Any:
    """The changes of each variant in the form in which they are kept."""
    if not isinstance(members, dict):
        return members  # refused by its reader, with what it expects
    return {
        str(name): canonical(changes) if isinstance(changes, dict) else changes
        for name, changes in members.items()
    }


def _parsed(override: str) -> tuple[str, Any]:
    """Key and value of one `key=value`."""
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise UserError(f"{override!r}: an override reads key=value, such as steps=100")
    if "[" in key:
        raise UserError(
            f"{override!r}: one item of a list cannot be set; give the whole list, "
            "such as data.size=[64, 64]"
        )
    try:
        return key, copy.deepcopy(_value_of(text))
    except UNREADABLE as error:
        raise UserError(f"{override}: {one_line(error)}") from None


@lru_cache(maxsize=512)
def _value_of(text: str) -> Any:
    """What a text on the command line stands for."""
    value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    assert isinstance(value, dict)
    return value["value"]


def _override_member(members: dict[str, Any], key: str, value: Any) -> None:
    """Apply an override of one variant (`NAME=...` or `NAME.dotted.key=...`).

    A variant's name may have dots: the longest that fits is meant.

    Raises:
        UserError: no such variant, or an alias that neither it nor anything else has.
    """
    names = sorted((n for n in members if f"{key}.".startswith(f"{n}.")), key=len)
    if not names and isinstance(value, dict) and "." not in key:
        members[key] = canonical(value)
        return
    if not names:
        hint = unknown_name("variant", key.partition(".")[0], members)
        raise UserError(f"variants.{key}: {hint}; add one by variants.NAME={{...}}")
    name = names[-1]
    setting = key[len(name) + 1 :]
    if not setting and value is None:
        del members[name]
    elif not setting:
        members[name] = canonical(value) if isinstance(value, dict) else value
    else:
        changes = members[name] if isinstance(members[name], dict) else {}
        members[name] = canonical(changes, {setting: value})


def _check_aliases(keys: list[str], content: Mapping[Any, Any]) -> None:
    """Refuse a setting of an objective or a teacher that neither recipe nor overrides make."""
    made = {key.rpartition(".")[0] for key in keys if key.rpartition(".")[2] in KINDS}
    made |= {key for key in keys if key.count(".") == 1}
    for key in keys:
        section, _, rest = key.partition(".")
        alias, _, setting = rest.partition(".")
        aliases = _mapping(content.get(section))
        if section not in ALIASED or not setting or alias in aliases:
            continue
        if f"{section}.{alias}" in made or section in keys:
            continue
        owners = [
            name
            for name, changes in _mapping(content.get("variants")).items()
            if any(f"{change}.".startswith(f"{section}.{alias}.") for change in _mapping(changes))
        ]
        if owners:
            raise UserError(
                f"{section}.{alias}: belongs to variants ({', '.join(owners)}): "
                f"override variants.{owners[0]}.{key}"
            )
        raise UserError(f"{section}.{alias}: {unknown_name('alias', alias, aliases)}")


def _mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is a mapping; validation refuses the rest later, with its own message."""
    return value if isinstance(value, Mapping) else {}
