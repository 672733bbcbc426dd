"""Paths as settings and options name them."""

import re
from pathlib import Path
from urllib.parse import quote

from alignlab.errors import UserError


def user_path(path: str | Path) -> Path:
    """A path with `~` and `~NAME` expanded, as a shell would.

    Settings keep what the recipe says: it is expanded where it is read, by the home of that
    machine.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: there is no such home folder; write ./{path} for a folder of that name"
        ) from None


def sqlite_url(database: Path) -> str:
    """SQLAlchemy's URL of a SQLite file, whatever its path: `%`, `?` and `#` are escaped."""
    return f"sqlite:///{quote(str(database))}"


def expanded_url(url: str) -> str:
    """A SQLite URL whose path begins with `~` with the home folder there; any other as it is.

    Raises:
        UserError: there is no such user.
    """
    found = re.fullmatch(r"(sqlite(?:\+\w+)?):///(~[^?]*)(.*)", url)
    if found is None:
        return url
    scheme, path, query = found.groups()
    return f"{scheme}:///{user_path(path)}{query}"
