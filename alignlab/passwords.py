"""Texts as they may be shown, sent and kept in reports: without the passwords of their URLs."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{0,30})://")
URL = re.compile(r"[^\s'\"<>`]*")
HOST_AND_PORT = re.compile(r"[^:]*:\d*(?:[/?#,;)\]}].*)?", re.DOTALL)
NAMES_A_USER = {*"postgres postgresql mysql mariadb mssql oracle cockroachdb ssh sftp".split()}
"""Schemes whose user name without a password is no secret, as `https://TOKEN@host` is."""
SECRET = re.compile(
    r"((?:[?&;#]|%3B|%26)[\w.\-]*"
    r"(?:passw(?:or)?d|passphrase|pass|pwd|token|secret|(?:api|access|private|account)[_\-]?key"
    r"|signature|credential|sig)(?:=|%3D))"
    r"(?:(?!%3B|%26)[^&;#])*",
    re.IGNORECASE,
)
ODBC = re.compile(r"(odbc_connect=(?:[\w.\-]*pwd|password)(?:=|%3D))[^&;#%]*", re.IGNORECASE)
LONGEST = 200  # characters of a password with spaces or quotes


def without_password(text: str) -> str:
    """A text in which the passwords of URLs are `***`: a URL, a command line, a recipe, a message.

    A password is what stands between the user's name and the last `@` before a query, also where
    it holds `/`, `@` or spaces that should have been escaped, and the value of a query's key such
    as `password`, `token` or `api_key`. Of a database's URL the user's name stays; of any other
    (`https://TOKEN@host`) it may be the secret, and goes as well. Where it is not sure, too much
    goes.
    """
    found = list(SCHEME.finditer(text))
    if not found:
        return text
    ends = [scheme.start() for scheme in found[1:]] + [len(text)]
    parts = [text[: found[0].start()]]
    for scheme, end in zip(found, ends, strict=True):
        parts += [scheme[0], _shown(scheme[1].lower(), text[scheme.end() : end])]
    return "".join(parts)


def without_passwords(content: Any) -> Any:
    """Plain data in which every text, but for keys, is as `without_password` gives it."""
    match content:
        case str():
            return without_password(content)
        case Mapping():
            return {key: without_passwords(value) for key, value in content.items()}
        case list() | tuple():
            return [without_passwords(value) for value in content]
    return content


def _shown(scheme: str, rest: str) -> str:
    """What follows `scheme://`, up to the next URL, without its password."""
    length = len(_url(rest))
    colon, at = _user_and_password(rest, length)
    shown = ""
    if at >= 0:
        names_a_user = bool(NAMES_A_USER & {*scheme.split("+")})
        if names_a_user and colon < 0:
            shown = rest[: at + 1]
        else:
            shown = f"{rest[:colon]}:{HIDDEN}@" if names_a_user else f"{HIDDEN}@"
        rest = rest[at + 1 :]
        length = len(_url(rest))
    query = ODBC.sub(rf"\1{HIDDEN}", SECRET.sub(rf"\1{HIDDEN}", rest[:length]))
    return shown + query + rest[length:]


def _user_and_password(rest: str, length: int) -> tuple[int, int]:
    """Where the colon between them and the `@` behind them are; -1 where there is none."""
    url = rest[:length]
    before = re.split(r"[/?#\[]", url, maxsplit=1)[0]
    colon, at = before.find(":"), url.split("?", 1)[0].rfind("@")
    if 0 <= colon < at:
        return colon, _last_of(rest, at)
    if colon >= 0 and at < 0 and not HOST_AND_PORT.fullmatch(url):
        at = url.rfind("@") if "@" in url else rest.find("@", 0, length + LONGEST)
        at = at if at < 0 else _last_of(rest, at)
        return colon, at
    return -1, re.split(r"[/?#]", url, maxsplit=1)[0].rfind("@")


def _last_of(rest: str, at: int) -> int:
    """The last `@` of a password with spaces or quotes that has one before them."""
    host = _url(rest[at + 1 :])
    further = host.split("?", 1)[0].rfind("@")
    if not host:
        further = rest[at + 1 : at + 1 + LONGEST].rfind("@")
    return at + 1 + further if further >= 0 else at


def _url(text: str) -> str:
    found = URL.match(text)
    return "" if found is None else found[0]
