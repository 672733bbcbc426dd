"""Text of the code as Markdown."""

import re

_CODE = re.compile(r"(`[^`]+`)")
_OPTION = re.compile(r"((?<![\w-])--[a-z][\w-]*)")
_MARKUP = re.compile(r"([\\*_<>\[\]|{}#$~])")


def prose(text: str) -> str:
    """Text of a docstring: code in backticks stays, options are code, nothing else is markup."""
    parts = _CODE.split(" ".join(text.split()))
    return "".join(part if _CODE.fullmatch(part) else _plain(part) for part in parts)


def _plain(text: str) -> str:
    parts = _OPTION.split(text)
    return "".join(code(p) if i % 2 else _MARKUP.sub(r"\\\1", p) for i, p in enumerate(parts))


def code(text: str) -> str:
    """Text as code, whatever is in it."""
    text = " ".join(text.split())
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}"
