"""The identity of a recipe: what two runs must share to be the same run.

It holds the settings that change a number, and of these only what differs from the defaults: a
setting that is added later, with a default that changes nothing, leaves the identity of every
older recipe as it was. An objective's setting whose default does change something says what was
done before it (`changed_default`), and counts from that. Any other default that changes needs a new
`VERSION`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from alignlab.config.fields_v1 import FIELDS_V1, GONE_V1
from alignlab.losses.objective import BEFORE

VERSION = 2
_PREFIX = f"v{VERSION}-"

SAME_NUMBERS = "same_numbers"
"""In a field's `json_schema_extra`: values that give the numbers of the default."""

Exclude = Mapping[str, Any]
"""Settings to leave out, as nested mappings that end in True."""


def identity(config: BaseModel, exclude: Exclude | None = None) -> dict[str, Any]:
    """The settings that differ from their defaults, as plain JSON values.

    A setting of one possible value is always there: the tag that picks one of several classes
    (`name: repa`, `kind: float`), and the mark of a rule that changed (`data.split_rule`), by which
    older recipes are told from today's.
    """
    left_out = exclude or {}
    settings: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if left_out.get(name) is True:
            continue
        inner = left_out.get(name) or {}
        if _is_tag(field) or _differs(value, field, inner):
            settings[name] = _plain(value, inner)
    return settings


def settings_hash(config: BaseModel, exclude: Exclude | None = None) -> str:
    """A short name of the identity: `v2-` and twelve hex digits."""
    return _PREFIX + _digest(_compact(identity(config, exclude)))


def has_hash(config: BaseModel, stored: str, exclude: Exclude | None = None) -> bool:
    """Whether a hash that was written earlier, by whatever version, is that of `config`.

    Args:
        config: the recipe of today.
        stored: the hash that was written.
        exclude: as the hash was made with.
    """
    if stored.startswith(_PREFIX):
        return stored == settings_hash(config, exclude)
    if _has_later_settings(config, exclude or {}):
        return False
    dumped = config.model_dump(mode="json", exclude=_pydantic(exclude or {}))
    # runs were hashed without spaces between the settings, sweeps with them
    compact, spaced = _as_of_v1(config, dumped, {}), _as_of_v1(config, dumped, GONE_V1)
    return stored in (_digest(_compact(compact)), _digest(json.dumps(spaced, sort_keys=True)))


def _before(field: FieldInfo) -> Any:
    """What a recipe meant that does not name a setting: its default, unless that changed."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and BEFORE in extra:
        return extra[BEFORE]
    return field.get_default(call_default_factory=True)


def as_default(config: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
    """The dump of a config with the default in place of each value that gives its numbers."""
    settled = dict(dumped)
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name in settled and _has_same_numbers(value, field):
            settled[name] = field.get_default(call_default_factory=True)
        elif name in settled and isinstance(value, BaseModel):
            settled[name] = as_default(value, settled[name])
    return settled


def _has_same_numbers(value: Any, field: FieldInfo) -> bool:
    """Whether a value is not the default and gives the same numbers."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and value in cast(list[Any], extra.get(SAME_NUMBERS, []))


def _differs(value: Any, field: FieldInfo, exclude: Exclude) -> bool:
    """Whether a setting is given another value than its default, as far as it is not left out, and
    one that gives other numbers."""
    if _has_same_numbers(value, field):
        return False
    return bool(_plain(value, exclude) != _plain(_before(field), exclude))


def _is_tag(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def _plain(value: Any, exclude: Exclude) -> Any:
    if isinstance(value, BaseModel):
        return identity(value, exclude)
    if isinstance(value, Mapping):  # with its order: losses are summed in that of the objectives
        return [[key, _plain(item, {})] for key, item in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item, {}) for item in value]
    return None if value is PydanticUndefined else to_jsonable_python(value)


def _has_later_settings(value: Any, exclude: Exclude) -> bool:
    """Whether a setting that version 1 did not have is given another value than its default.

    A tag that it did not have marks what is computed otherwise since.
    """
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        old = FIELDS_V1.get(type(value).__name__, frozenset(fields))
        return any(
            _has_later_settings(getattr(value, name), exclude.get(name) or {})
            if name in old
            else _is_tag(field) or _differs(getattr(value, name), field, exclude.get(name) or {})
            for name, field in fields.items()
            if exclude.get(name) is not True
        )
    if isinstance(value, Mapping):
        return any(_has_later_settings(one, {}) for one in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(_has_later_settings(one, {}) for one in value)
    return False


def _as_of_v1(value: Any, dumped: Any, gone: Mapping[str, Mapping[str, Any]]) -> Any:
    """The dump of a value without the settings that version 1 did not have.

    Args:
        gone: what is put in by name of the class: `GONE_V1`, or nothing.
    """
    if isinstance(value, BaseModel):
        name = type(value).__name__
        old = FIELDS_V1.get(name, frozenset(dumped))
        kept = {k: _as_of_v1(getattr(value, k), v, gone) for k, v in dumped.items() if k in old}
        return kept | dict(gone.get(name, {}))
    if isinstance(value, Mapping):
        return {key: _as_of_v1(value[key], item, gone) for key, item in dumped.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_as_of_v1(one, item, gone) for one, item in zip(value, dumped, strict=True)]
    return dumped


def _pydantic(exclude: Exclude) -> Any:
    return {k: True if v is True else _pydantic(v) for k, v in exclude.items()}


def _compact(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
