"""One line for a validation error: the dotted key, what is wrong, what is valid there."""

import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from alignlab.config.data import unknown_name
from alignlab.errors import shown

Location = tuple[int | str, ...]
# Names that installed packages register; teachers and metrics say theirs by themselves.
_PACKAGES_ADD = re.compile(r"objectives\..+\.name|data\.name")

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "model_attributes": "a mapping",
}


def first_problem(model: type[BaseModel], error: ValidationError, under: str = "") -> str:
    """The first problem in reading order, and how many more there are.

    Args:
        model: the class whose validation failed.
        error: what pydantic raised.
        under: dotted key under which `model` sits in the recipe, may be empty.
    """
    problems = error.errors(include_url=False)
    # A misspelt key also makes the key it stands for missing: tell the cause, not the effect.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    key, parent = _locate(model, problems[0]["loc"])
    line = _describe(problems[0], key, parent)
    if under:
        line = f"{under}.{line}"
    more = len(problems) - 1
    return line + (f" (and {more} more problem{'s' * (more > 1)})" if more else "")


def _describe(problem: ErrorDetails, key: str, parent: type[BaseModel] | None) -> str:
    kind, given = problem["type"], problem["input"]
    if kind == "extra_forbidden" and parent is not None:
        last = str(problem["loc"][-1])
        return f"{key}: {unknown_name('key', last, parent.model_fields)}"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "value_error":
        text = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {text}" if key else text
    if kind in ("literal_error", "union_tag_invalid"):
        context = problem["ctx"]
        expected = str(context.get("expected", context.get("expected_tags"))).replace(" or ", ", ")
        valid = [choice.strip(" '") for choice in expected.split(",")]
        key += ".name" if context.get("discriminator") == "'name'" else ""
        given = str(context.get("tag", given))
        of_packages = kind == "union_tag_invalid" and _PACKAGES_ADD.fullmatch(key) is not None
        return f"{key}: {unknown_name('value', given, valid, of_packages=of_packages)}"
    if kind == "union_tag_not_found":
        return (
            f"{key}: {problem['ctx']['discriminator']} is missing"
            if isinstance(given, dict)
            else _mistyped(key, "dict", given)
        )
    if kind == "int_parsing_size":
        return f"{key}: a whole number too large to read, got {shown(given, 30)}"
    stem = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    if stem in EXPECTED:
        return _mistyped(key, stem, given)
    return f"{key}: {problem['msg'].removeprefix('Input ')}, got {shown(given)}"


def _mistyped(key: str, stem: str, given: Any) -> str:
    return f"{key}: expected {EXPECTED[stem]}, got {shown(given)}"


def _locate(model: type[BaseModel], location: Location) -> tuple[str, type[BaseModel] | None]:
    """The dotted key of pydantic's location, and the model that holds its last part."""
    keys: list[str] = []
    here: Any = model
    holder: type[BaseModel] | None = None
    for part in location:
        members = _union_members(here)
        tagged = [member for member in members if part in _tags(member)] or _marked(here, part)
        if tagged:  # pydantic puts the tag of a union into the location; no recipe has it there
            here = tagged[0]
            continue
        keys.append(str(part))
        here = members[0] if len(members) == 1 else here
        holder = here if isinstance(here, type) and issubclass(here, BaseModel) else None
        here = _child(here, part)
    return ".".join(keys), holder


def _child(here: Any, part: int | str) -> Any:
    """The type one level down; None where it is not known."""
    if isinstance(here, type) and issubclass(here, BaseModel):
        field = here.model_fields.get(str(part))
        return None if field is None else field.annotation
    if get_origin(here) is dict:
        return get_args(here)[1]
    return None


def _union_members(here: Any) -> list[Any]:
    """The types a value may have, without None and without annotations."""
    while get_origin(here) is Annotated:
        here = get_args(here)[0]
    if get_origin(here) in (Union, UnionType):
        return [
            member
            for arg in get_args(here)
            if arg is not type(None)
            for member in _union_members(arg)
        ]
    return [here]


def _marked(here: Any, part: int | str) -> list[Any]:
    """The member of a union whose pydantic `Tag` this is, for one that a function picks from."""
    while get_origin(here) is Annotated:
        here = get_args(here)[0]
    members = get_args(here) if get_origin(here) in (Union, UnionType) else ()
    return [
        member
        for member in members
        if get_origin(member) is Annotated and Tag(str(part)) in get_args(member)[1:]
    ]


def _tags(member: Any) -> tuple[Any, ...]:
    """The values of `name` or `kind` that pick this member of a discriminated union."""
    if isinstance(member, type) and issubclass(member, BaseModel):
        for key in ("name", "kind"):
            field = member.model_fields.get(key)
            if field is not None and get_origin(field.annotation) is Literal:
                return get_args(field.annotation)
    return ()
