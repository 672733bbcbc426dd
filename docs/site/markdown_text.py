"""Text of the code as Markdown."""

import re

_CODE = re.compile(r"(`[^`]+`)")
_MARKUP = re.compile(r"([\\*_<>\[\]|{}#$~])")


def prose(text: str) -> str:
    """Text of a docstring: code in backticks stays, no other character is markup."""
    parts = _CODE.split(" ".join(text.split()))
    return "".join(p if _CODE.fullmatch(p) else _MARKUP.sub(r"\\\1", p) for p in parts)


def code(text: str) -> str:
    """Text as code, whatever is in it."""
    text = " ".join(text.split())
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}"
