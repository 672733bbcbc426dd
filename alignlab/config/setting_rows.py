"""The settings of a config class as rows: name, type, default, meaning.

A meaning is the docstring below the field, or what the `Args:` of its class say of it, after those
of the classes that it derives from. A section, and a tag that picks one of several classes
(`name: repa`), mean what the docstring of their class begins with.
"""

import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

_TAGS = ("name", "kind")  # a field of one literal that picks the class


@dataclass(frozen=True)
class SettingRow:
    """One setting of a recipe.

    Args:
        name: dotted; a part in capitals (`teachers.ALIAS.path`) stands for a name of the recipe's.
        type: in words, such as `integer or null`; `section` for what only holds other settings.
        default: as plain JSON values; None also for a setting that is required, and for a section.
        required: whether a recipe has to name it.
        when: the tag of the class that has it (`name: folder`), empty for a setting that is always
            there.
        meaning: one paragraph, never empty for a class that documents its fields.
        source: the config class that declares it, as a dotted path.
    """

    name: str
    type: str
    default: Any
    required: bool
    when: str
    meaning: str
    source: str

    def as_json(self) -> dict[str, Any]:
        """Plain values with stable keys."""
        return asdict(self)

    @property
    def shown_default(self) -> str:
        """The default as a recipe writes it; a word for a setting without one."""
        if self.required:
            return "required"
        if self.type == "section":
            return "-"
        return shown_value(self.default)


def shown_value(value: Any) -> str:
    """A plain value as a recipe may write it."""
    is_bare = isinstance(value, str) and value.strip() == value != ""
    return value if is_bare else json.dumps(value, ensure_ascii=False)


def setting_rows(
    config: type[BaseModel],
    under: str = "",
    *,
    when: str = "",
    values: BaseModel | None = None,
    placeholders: Mapping[str, str] | None = None,
) -> Iterator[SettingRow]:
    """One row for every field of a config class, those of nested classes below their section's.

    Args:
        config: the class.
        under: dotted name of where it stands in a recipe.
        when: as in `SettingRow`, for all rows.
        values: an instance whose values are the defaults; None: the fields' own.
        placeholders: dotted name of a mapping of configs -> what stands for its keys, such as
            `{"teachers": "ALIAS"}`. Other mappings are one setting each.
    """
    for key, field in config.model_fields.items():
        name = f"{under}.{key}" if under else key
        default = field.get_default(call_default_factory=True) if values is None else None
        default = default if values is None else getattr(values, key)
        required = values is None and field.is_required()
        inner, many = _classes(field.annotation)
        is_section = _is_config(_bare(field.annotation))
        yield SettingRow(
            name=name,
            type="section" if is_section else type_in_words(field),
            default=None if required or is_section else to_jsonable_python(default),
            required=required,
            when=when,
            meaning=meaning(config, key),
            source=_declared_in(config, key),
        )
        if many:
            if not placeholders or name not in placeholders:
                continue
            name = f"{name}.{placeholders[name]}"
        for one in inner:
            yield from setting_rows(
                one,
                name,
                when=when if len(inner) == 1 else _tag_of(one),
                values=default if type(default) is one and not many else None,
                placeholders=placeholders,
            )


def meaning(config: type[BaseModel], key: str) -> str:
    """What a field of a config class means, in one paragraph; empty where nothing says it."""
    field = config.model_fields[key]
    if key in _TAGS and get_origin(field.annotation) is Literal and not field.description:
        return first_paragraph(config)
    if field.description:
        return _in_one_line(field.description)
    described = [_documented_arguments(one).get(key, "") for one in reversed(config.__mro__)]
    if any(described):
        return " ".join(filter(None, described))
    inner, many = _classes(field.annotation)
    return first_paragraph(inner[0]) if len(inner) == 1 and not many else ""


def _declared_in(config: type[BaseModel], key: str) -> str:
    """The class that a setting comes from, which may be one that the config derives from."""
    one = next(one for one in config.__mro__ if key in inspect.get_annotations(one))
    return f"{one.__module__}.{one.__qualname__}"


def first_paragraph(thing: type) -> str:
    """The first paragraph of a class's own docstring, in one line."""
    doc = thing.__dict__.get("__doc__") or ""
    return _in_one_line(inspect.cleandoc(doc).split("\n\n", 1)[0])


def type_in_words(field: FieldInfo) -> str:
    """What may stand there, such as `integer`, `list of integer`, `one of full, lora`."""
    return _in_words(field.annotation)


def _in_words(annotation: Any) -> str:
    annotation = _bare(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        if all(_is_config(_bare(one)) or one is type(None) for one in arguments):
            return "mapping or null" if type(None) in arguments else "mapping"
        return " or ".join(dict.fromkeys(map(_in_words, arguments)))
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {_in_words(arguments[0])}"
        return f"list of {len(arguments)}: {_in_words(arguments[0])}"
    if origin is dict or _is_config(annotation):
        return "mapping"
    words = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything"}
    return words.get(annotation) or ("null" if annotation is type(None) else str(annotation))


def _bare(annotation: Any) -> Any:
    """An annotation without what pydantic checks besides."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _classes(annotation: Any) -> tuple[list[type[BaseModel]], bool]:
    """The config classes that may stand in a field, and whether there may be many of them."""
    annotation = _bare(annotation)
    if _is_config(annotation):
        return [annotation], False
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        found = [_classes(one) for one in arguments]
        return [one for classes, _ in found for one in classes], any(many for _, many in found)
    if origin in (dict, tuple, list):
        return [one for argument in arguments for one in _classes(argument)[0]], True
    return [], False


def _tag_of(config: type[BaseModel]) -> str:
    """How a recipe picks this class of several, such as `name: repa`."""
    for tag in _TAGS:
        field = config.model_fields.get(tag)
        if field is not None and get_origin(field.annotation) is Literal:
            return f"{tag}: {' or '.join(map(str, get_args(field.annotation)))}"
    return ""


def _documented_arguments(config: type) -> dict[str, str]:
    """The `Args:` of a class's own docstring, by name."""
    doc = inspect.cleandoc(config.__dict__.get("__doc__") or "")
    _, found, section = doc.partition("\nArgs:\n")
    if not found:
        return {}
    section = re.split(r"\n(?=\S)", section, maxsplit=1)[0]  # up to the next section
    entries = re.split(r"^ {4}(\w+): ", section, flags=re.MULTILINE)[1:]
    return {
        name: _in_one_line(text) for name, text in zip(entries[::2], entries[1::2], strict=True)
    }


def _in_one_line(text: str) -> str:
    return " ".join(text.split())
