"""The rule of names: what a folder, a variant and an alias may be called.

A name is part of folders, of dotted keys, of MLflow's metrics, of tables and of pages, so it is
restricted where it is given: **letters and digits of any script, and `_ . + -`; not dots alone; at
most 200 bytes, as file names have limits**. An alias of an objective or a teacher has no dot and no
`+` either: dots separate the keys of a recipe, and MLflow's metrics know no `+`; at most 100 bytes.

Captions, subjects and entities of a data set are no names but free text. They are escaped where
they are written (`alignlab.experiments.report.escaping`).
"""

import re

from alignlab.errors import shown

MAX_BYTES = 200
MAX_ALIAS_BYTES = 100


def check_name(name: str, what: str = "a name") -> str:
    """Refuses what breaks the rule of names; returns the name.

    Args:
        name: one part of a path.
        what: what it names, for the message.

    Raises:
        ValueError: it says which character stands where, and the rule.
    """
    rule = f"{what} is made of letters, digits and . + - _"
    _check(name, r"[\w.+-]", rule, MAX_BYTES)
    if set(name) == {"."}:
        raise ValueError(f"{shown(name)} means a folder: {rule}, and not of dots alone")
    return name


def check_alias(alias: str) -> str:
    """Refuses what breaks the rule of aliases; returns the alias.

    Raises:
        ValueError: as `check_name`.
    """
    _check(alias, r"[\w-]", "an alias is made of letters, digits, - and _", MAX_ALIAS_BYTES)
    return alias


def _check(name: str, allowed: str, rule: str, most: int) -> None:
    if not name:
        raise ValueError(f"'' is empty: {rule}")
    for place, char in enumerate(name, start=1):
        if not re.fullmatch(allowed, char):
            raise ValueError(
                f"{shown(name)} holds {char!r} (U+{ord(char):04X}) in place {place}: {rule}"
            )
    size = len(name.encode())
    if size > most:
        raise ValueError(f"{shown(name)} takes {size} bytes: {rule}, at most {most} bytes of them")
