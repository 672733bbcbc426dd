"""Names and values as MLflow takes them; what it refuses is written otherwise.

Other trackers take more, and get the same: a metric has one name everywhere.
"""

import hashlib
import posixpath
import re
from collections.abc import Mapping

from alignlab.config.merging import flatten
from alignlab.config.parts import TrainingConfig
from alignlab.passwords import without_password

# MLflow's own limits.
MAX_NAME = 250
MAX_VALUE = 6000
MAX_TAG = 5000  # Databricks; MLflow's servers take 8000
CUT = "..."
REFUSED = re.compile(r"[^/\w.\- :]", re.ASCII)


def tracked_name(name: str) -> str:
    """The name of a metric or a parameter in trackers.

    ASCII letters, digits, space and `_ - . : /` stay. Any other character becomes `_x` and its code
    point in hexadecimal digits, then `_`: `dino v2 (b)` is `dino v2 _x28_b_x29_`. So do dots and
    slashes where the name would be another one as a path (`a//b`, `../a`). A name of more than 250
    characters keeps its beginning, and ends in 16 digits of its SHA-256.
    """
    taken = REFUSED.sub(_escaped, name)
    path = posixpath.normpath(taken)
    if path != taken or path == "." or path.startswith(("..", "/")):
        taken = re.sub(r"[./]", _escaped, taken)
    if len(taken) > MAX_NAME:
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
        taken = f"{taken[: MAX_NAME - len(digest) - 1]}_{digest}"
    return taken


def mlflow_params(config: TrainingConfig) -> dict[str, str]:
    """Settings of a recipe by dotted name; a value that is too long ends in `...`.

    The whole of it is in the artifact `recipe.yaml`. Passwords in URLs are left out.
    """
    settings = flatten(config.model_dump(mode="json"))
    return {
        tracked_name(key): cut(without_password(str(value)), MAX_VALUE)
        for key, value in settings.items()
    }


def mlflow_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as MLflow takes them, without passwords in URLs; one that is too long ends in `...`."""
    return {tracked_name(key): cut(without_password(value), MAX_TAG) for key, value in tags.items()}


def cut(text: str, length: int) -> str:
    """A text that ends in `...` where it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length - len(CUT)]}{CUT}"


def _escaped(found: re.Match[str]) -> str:
    return f"_x{ord(found[0]):x}_"
