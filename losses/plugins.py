"""Objectives of other installed packages, found by the entry point group `alignlab.objectives`."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Literal, get_args, get_origin

from alignlab.losses.objective import Objective, ObjectiveConfig

GROUP = "alignlab.objectives"


# What importing foreign code commonly ends in; the error line says whose code it is.
BROKEN = (
    ImportError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class PluginError(ValueError):
    """A package registers an objective that cannot be used; one line that names the package."""


def installed_objectives(built_in: Mapping[str, type[Objective]]) -> dict[str, type[Objective]]:
    """Loads what packages registered, by name, in the order of their names.

    Args:
        built_in: rows whose names are taken.

    Raises:
        PluginError: a name is taken, or what it stands for is no final `Objective` whose
            `Config.name` is that name.
    """
    found: dict[str, type[Objective]] = {}
    owners = dict.fromkeys(built_in, "alignlab")
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, _package(point))):
        if point.name in owners:
            raise PluginError(f"{_says(point)}: {owners[point.name]} has that name already")
        found[point.name] = _load(point)
        owners[point.name] = f"package {_package(point)}"
    return found


def _load(point: EntryPoint) -> type[Objective]:
    try:
        thing = point.load()
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PluginError(f"{_says(point)}: cannot load {point.value}: {reason}") from error
    problem = _problem(thing, point.name)
    if problem is not None:
        raise PluginError(f"{_says(point)}: {point.value} {problem}")
    assert isinstance(thing, type) and issubclass(thing, Objective)
    return thing


def _problem(thing: object, name: str) -> str | None:
    """Says what keeps a thing from being the objective `name`."""
    if not (isinstance(thing, type) and issubclass(thing, Objective)):
        return "is no class derived from alignlab.losses.objective.Objective"
    if not getattr(thing, "__final__", False):
        return "is not final: put @typing.final above the class"
    if getattr(thing, "tokens", None) not in ("video", "reference"):
        return 'must say which tokens it taps: tokens = "video" or "reference"'
    config = getattr(thing, "Config", None)
    if not (isinstance(config, type) and issubclass(config, ObjectiveConfig)):
        return "has no Config derived from alignlab.losses.objective.ObjectiveConfig"
    field = config.model_fields["name"]
    is_literal = get_origin(field.annotation) is Literal and get_args(field.annotation) == (name,)
    if not is_literal or field.default != name:
        return f'has a Config without the line: name: Literal["{name}"] = "{name}"'
    return None


def _says(point: EntryPoint) -> str:
    return f"package {_package(point)} registers objective {point.name!r}"


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "of unknown name"
