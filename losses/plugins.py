"""What other installed packages register under an entry point group; it knows none of the groups.

`alignlab.losses.registry` reads objectives with it, `alignlab.losses.stage1.folder` Stage 1
networks, which objectives in turn import: hence a file of its own. Kernels are read by
`alignlab.kernels.plugins`, with the rule of their own that a broken one is no error.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from typing import NamedTuple, TypeVar

from alignlab.kernels.plugins import FOREIGN, by_name, package_of, told

Row = TypeVar("Row")


class PluginError(ValueError):
    """A package registers something that cannot be used; one line that names the package."""


class Registration(NamedTuple):
    """One entry point, loaded.

    Args:
        name: under which it is registered.
        loaded: what its value stands for.
        source: for messages: the package and what it registers.
        value: `module:attribute`, as the package wrote it.
    """

    name: str
    loaded: object
    source: str
    value: str

    def refusal(self, problem: str) -> PluginError:
        """Makes the error of a registration that is not what its group needs."""
        return PluginError(f"{self.source}: {self.value} {problem}")


def registrations(group: str, what: str, taken: Iterable[str]) -> Iterator[Registration]:
    """Loads what packages registered, in the order of their names.

    Args:
        group: of the entry points, such as `alignlab.objectives`.
        what: one member of the group, as in messages.
        taken: names that alignlab has itself.

    Raises:
        PluginError: a name is taken, or its value cannot be imported.
    """
    owners = dict.fromkeys(taken, "alignlab")
    points = sorted(entry_points(group=group), key=by_name)
    for point in points:
        source = f"package {package_of(point)} registers {what} {point.name!r}"
        if point.name in owners:
            raise PluginError(f"{source}: {owners[point.name]} has that name already")
        owners[point.name] = f"package {package_of(point)}"
        try:
            loaded = point.load()
        except FOREIGN as error:
            raise PluginError(f"{source}: cannot load {point.value}: {told(error)}") from error
        yield Registration(point.name, loaded, source, point.value)


def installed_rows(
    group: str,
    what: str,
    taken: Iterable[str],
    row: type[Row],
    problem_of: Callable[[Row], str | None],
) -> dict[str, Row]:
    """Loads the rows of a table that packages registered, in the order of their names.

    Args:
        group: as in `registrations`, and so `what` and `taken`.
        what: see there.
        taken: see there.
        row: class of a row.
        problem_of: says what keeps a row from being used; None if nothing does.

    Raises:
        PluginError: a name is taken, or what it stands for is no row that can be used.
    """
    rows: dict[str, Row] = {}
    for registration in registrations(group, what, taken):
        loaded = registration.loaded
        if not isinstance(loaded, row):
            raise registration.refusal(f"is no {row.__module__}.{row.__name__}")
        problem = problem_of(loaded)
        if problem is not None:
            raise registration.refusal(problem)
        rows[registration.name] = loaded
    return rows
