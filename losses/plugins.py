"""What other installed packages register under an entry point group; it knows none of the groups.

`alignlab.losses.registry` reads objectives with it, `alignlab.losses.stage1.folder` Stage 1
networks, which objectives in turn import: hence a file of its own. There and of teachers, a
registration that cannot be used is an error; of metrics and data sets, as of kernels
(`alignlab.kernels.plugins`), it is a line that keeps nothing else from running.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from typing import Generic, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel

from alignlab.kernels.plugins import by_name, load_point, package_of

Row = TypeVar("Row")


class PluginError(ValueError):
    """A package registers something that cannot be used; one line that names the package."""


class Registration(NamedTuple):
    """One entry point.

    Args:
        name: under which it is registered.
        loaded: what its value stands for; None if there is a problem.
        source: for messages: the package and what it registers.
        value: `module:attribute`, as the package wrote it.
        package: that registers it.
        version: of the package.
        problem: why it cannot be loaded, in one line that names the package.
    """

    name: str
    loaded: object
    source: str
    value: str
    package: str
    version: str
    problem: str | None = None

    def told(self, problem: str) -> str:
        """The line about a registration that is not what its group needs."""
        return f"{self.source}: {self.value} {problem}"

    def refusal(self, problem: str) -> PluginError:
        """Makes the error of a registration that is not what its group needs."""
        return PluginError(self.told(problem))


class InstalledRow(NamedTuple, Generic[Row]):
    """One row that a package registers.

    Args:
        name: of the row.
        package: that registers it.
        version: of the package.
        row: None if it cannot be used.
        problem: why it cannot be used, in one line that names the package.
    """

    name: str
    package: str
    version: str
    row: Row | None
    problem: str | None = None

    @property
    def full_name(self) -> str:
        """The name with the package that it needs, as recipes keep it."""
        return f"{self.name}@{self.package}"


def look_up(
    group: str, what: str, taken: Iterable[str], only: str | None = None
) -> Iterator[Registration]:
    """Loads what packages registered, in the order of their names.

    Args:
        group: of the entry points, such as `alignlab.metrics`.
        what: one member of the group, as in messages.
        taken: names that alignlab has itself.
        only: the name that is asked for: nothing else is loaded. None: all are.
    """
    owners = dict.fromkeys(taken, "alignlab")
    for point in sorted(entry_points(group=group), key=by_name):
        package = package_of(point)
        owner = owners.get(point.name)
        owners.setdefault(point.name, f"package {package}")
        if only not in (None, point.name):
            continue
        source = f"package {package} registers {what} {point.name!r}"
        loaded, problem = None, None
        if owner is not None:
            problem = f"{owner} has that name already"
        else:
            loaded, problem = load_point(point)
        line = None if problem is None else f"{source}: {problem}"
        version = "" if point.dist is None else point.dist.version
        yield Registration(point.name, loaded, source, point.value, package, version, line)


def registrations(group: str, what: str, taken: Iterable[str]) -> Iterator[Registration]:
    """As `look_up`, for a group of which every registration has to be usable.

    Raises:
        PluginError: a name is taken, or its value cannot be imported.
    """
    for registration in look_up(group, what, taken):
        if registration.problem is not None:
            raise PluginError(registration.problem)
        yield registration


def told_rows(
    group: str,
    what: str,
    taken: Iterable[str],
    row: type[Row],
    problem_of: Callable[[Row], str | None],
    only: str | None = None,
) -> list[InstalledRow[Row]]:
    """The rows that packages registered, in the order of names; what is unusable has a problem.

    Args:
        group: as in `look_up`, and so `what`, `taken` and `only`.
        what: see there.
        taken: see there.
        row: class of a row.
        problem_of: says what keeps a row from being used; None if nothing does.
        only: see there.
    """
    rows: list[InstalledRow[Row]] = []
    for one in look_up(group, what, taken, only):
        loaded, problem = one.loaded, one.problem
        if problem is None and not isinstance(loaded, row):
            problem = one.told(f"is no {row.__module__}.{row.__name__}")
        elif isinstance(loaded, row) and (reason := problem_of(loaded)) is not None:
            problem = one.told(reason)
        usable = loaded if problem is None and isinstance(loaded, row) else None
        rows.append(InstalledRow(one.name, one.package, one.version, usable, problem))
    return rows


def installed_rows(
    group: str,
    what: str,
    taken: Iterable[str],
    row: type[Row],
    problem_of: Callable[[Row], str | None],
) -> dict[str, Row]:
    """Loads the rows of a table that packages registered, in the order of their names.

    Args:
        group: as in `told_rows`, and so all others.
        what: see there.
        taken: see there.
        row: see there.
        problem_of: see there.

    Raises:
        PluginError: a name is taken, or what it stands for is no row that can be used.
    """
    rows: dict[str, Row] = {}
    for one in told_rows(group, what, taken, row, problem_of):
        if one.row is None:
            raise PluginError(one.problem)
        rows[one.name] = one.row
    return rows


def lacks_name(config: type[BaseModel], name: str) -> str | None:
    """Says of a config that is no `name: Literal[name]` what it lacks."""
    field = config.model_fields.get("name")
    is_tag = field is not None and get_origin(field.annotation) is Literal
    if field is not None and is_tag and get_args(field.annotation) == (name,) == (field.default,):
        return None
    return f'has a Config without the line: name: Literal["{name}"] = "{name}"'
