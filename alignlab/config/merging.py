"""How settings are laid over settings: one rule for recipes, variants, sweeps and overrides.

- A dotted key edits: `objectives.ra.weight: 2` changes the weight and leaves the rest.
- A mapping that names its kind (`name`, `family` or `kind`) is whole: it replaces what was there,
  so that nothing of one objective leaks into another of the same alias. Any other mapping edits,
  key by key. A `name` that is edited to another value clears what belonged to the old one.
- `{}` removes, and so does `null` in the place of an objective, of a teacher, or of all of them.

Changes come in an order, and later ones win: `{objectives: {}, objectives.b: {...}}` leaves b
alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignlab.errors import UserError, shown

KINDS = ("name", "family", "kind")
"""Settings that say which class a mapping describes."""
ALIASED = ("objectives", "teachers")
"""Mappings by alias, of which the recipe may have none."""
MAX_DEPTH = 20
"""Levels of a recipe. Real ones have six; the libraries that read them recurse."""

Path = tuple[str, ...]


def merge(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with changes laid over it, in their order; nothing that is given is altered.

    Args:
        base: nested settings.
        changes: settings; their keys may be dotted.

    Raises:
        UserError: a key that no setting can have, a list edited by item, too many levels.
    """
    merged = _copied(base)
    for path, value in _ordered(changes):
        _set(merged, path, value)
    return merged


def canonical(*changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes in the one form in which they are kept: by dotted key, in their order.

    `merge(base, canonical(*changes))` equals `merge(base, *changes)`; written down and read again,
    they still do the same.

    Raises:
        UserError: as `merge`.
    """
    return {".".join(path): value for path, value in _ordered(changes)}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _steps(changes: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The changes one by one: where, and what is put there."""
    for name, value in changes.items():
        path = (*above, *str(name).split("."))
        if not all(path):
            raise UserError(
                f"{shown('.'.join(path))}: a key is made of names with single dots between"
            )
        if len(path) > MAX_DEPTH:
            raise UserError(f"{'.'.join(path[:3])}...: more than {MAX_DEPTH} levels; no setting is")
        if not isinstance(value, Mapping):
            yield path, value
        elif not value:
            yield path, {}
        elif any(isinstance(value.get(kind), str) for kind in KINDS):
            yield path, merge({}, value)
        else:
            yield from _steps(value, path)


def _ordered(changes: Sequence[Mapping[str, Any]]) -> list[tuple[Path, Any]]:
    """The changes one by one, in the order in which they are made; of several of a key the last."""
    last: dict[Path, Any] = {}
    for change in changes:
        for path, value in _steps(change):
            last.pop(path, None)  # it comes in its own place
            last[path] = value
    return _kinds_first(list(last.items()))


def _kinds_first(steps: list[tuple[Path, Any]]) -> list[tuple[Path, Any]]:
    """Edits of a kind before those of its neighbours, which they would clear.

    But behind the last change of the whole mapping, or of one around it.
    """
    ordered: list[tuple[Path, Any]] = []
    for path, value in steps:
        place = len(ordered)
        if len(path) > 1 and path[-1] in KINDS:
            for at in reversed(range(len(ordered))):
                other = ordered[at][0]
                if other == path[: len(other)] and len(other) < len(path):
                    break
                if other[-1] in KINDS and other[:-1] == path[:-1]:
                    break  # kinds keep their order among themselves
                if len(other) >= len(path) and other[: len(path) - 1] == path[:-1]:
                    place = at
        ordered.insert(place, (path, value))
    return ordered


def _set(settings: dict[str, Any], path: Path, value: Any) -> None:
    """Put one value into nested settings, or take it out."""
    if value == {} or (value is None and _may_be_absent(path)):
        _remove(settings, path)
        return
    *parents, last = path
    here = settings
    for depth, parent in enumerate(parents, 1):
        inner = here.get(parent)
        if isinstance(inner, list):
            raise UserError(f"{'.'.join(path[:depth])}: is a list; give the whole of it")
        if not isinstance(inner, dict):
            inner = here[parent] = {}
        here = inner
    if parents and last in KINDS and isinstance(here.get(last), str) and here[last] != value:
        here.clear()
    here[last] = _copied(value) if isinstance(value, Mapping) else value


def _remove(settings: dict[str, Any], path: Path) -> None:
    """Take a value out, and a mapping of which nothing is left."""
    first, rest = path[0], path[1:]
    inner = settings.get(first)
    if rest and isinstance(inner, dict):
        _remove(inner, rest)
    if not rest or inner == {}:
        settings.pop(first, None)


def _may_be_absent(path: Path) -> bool:
    return path[0] in ALIASED and len(path) <= 2  # the section, or an alias in it


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copied(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
    }
