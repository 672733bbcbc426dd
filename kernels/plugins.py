"""Implementations of the operations that other installed packages register.

An entry point of the group `alignlab.kernels` stands for a `Kernel`, or for a tuple of kernels of
different operations; its name is what `impl` is set to. `dispatch.py` asks this file for a name
that is none of its own, `alignlab doctor` for all. A registration that cannot be used is a line of
text: it keeps nothing else from running.

Below that is how foreign code is loaded, which `alignlab.losses.plugins` does as well. This file
imports nothing of alignlab.
"""

import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

GROUP = "alignlab.kernels"
RESERVED = ("auto", "eager", "chunked", "triton", "compile", "floor")
"""Names of alignlab's own implementations, and of what its benchmark measures beside them."""
NAME = r"[A-Za-z_][\w-]*"
NAME_RULE = "a name is made of letters, digits, _ and -, and begins with a letter"

# Whatever loading or asking foreign code may end in. As broad as this nowhere else: a package may
# run a compiler when it is imported, raise a class of its own or call sys.exit, and what is wrong
# with a package that nobody asked for must not end a command. Nothing is lost: it becomes a line.
FOREIGN = (Exception, SystemExit)

# Kinds of errors whose message says enough without the kind.
BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class ImplementationError(ValueError):
    """An implementation does not exist, cannot run here, or gave what its operation does not."""


def nothing_missing() -> None:
    """What `missing` is of a kernel that runs everywhere."""


@dataclass(frozen=True)
class Kernel:
    """An implementation of an operation, as another package registers it.

    Args:
        op: the operation, `pull_push`, `relation` or `local_gram`.
        function: called as the operation's plain reference is, with all arguments by position;
            that is `pull_push_eager` and so on in the file of the operation.
        missing: says in one line why it cannot run on this machine, or None if it can; asked at
            every call, so it should be quick.
    """

    op: str
    function: Callable[..., Any]
    missing: Callable[[], str | None] = nothing_missing


class Installed(NamedTuple):
    """One kernel that a package registers.

    Args:
        name: what `impl` is set to.
        package: that registers it.
        kernel: None if it cannot be used.
        problem: why it cannot be used, in one line that names the package.
    """

    name: str
    package: str
    kernel: Kernel | None
    problem: str | None = None

    @property
    def full_name(self) -> str:
        """The name with the package that it needs, as recipes keep it."""
        return f"{self.name}@{self.package}"

    def missing(self) -> str | None:
        """Why it cannot run here, or None if it can."""
        return self.problem if self.kernel is None else reason_of(self.kernel.missing)


def load_kernels(references: Mapping[str, Callable[..., Any]]) -> list[Installed]:
    """Loads what packages registered, in the order of names; what cannot be used has a problem.

    Args:
        references: plain reference by operation, whose arguments a kernel must take.
    """
    found: list[Installed] = []
    owners = {(op, name): "alignlab" for op in references for name in RESERVED}
    for point in sorted(entry_points(group=GROUP), key=by_name):
        package = package_of(point)
        source = f"package {package} registers kernel {point.name!r}"
        kernels, problem = _loaded(point)
        if problem is not None:
            found.append(Installed(point.name, package, None, f"{source}: {problem}"))
        for kernel in kernels:
            problem = _problem(kernel, references)
            owner = owners.get((kernel.op, point.name)) if problem is None else None
            if owner is not None:
                problem = f"{owner} has that name already"
            elif problem is not None:
                problem = f"{point.value} {problem}"
            else:
                owners[kernel.op, point.name] = f"package {package}"
            text = None if problem is None else f"{source}: {problem}"
            found.append(Installed(point.name, package, None if problem else kernel, text))
    return found


def packages_with_kernels() -> list[str]:
    """The packages that register kernels, without loading any."""
    return sorted({package_of(point) for point in entry_points(group=GROUP)})


def _loaded(point: EntryPoint) -> tuple[tuple[Kernel, ...], str | None]:
    """The kernels of an entry point, or why there are none."""
    if point.name in RESERVED:
        return (), "alignlab has that name already"
    if not re.fullmatch(NAME, point.name):
        return (), NAME_RULE
    loaded, problem = load_point(point)
    if problem is not None:
        return (), problem
    kernels = loaded if isinstance(loaded, tuple) else (loaded,)
    if not kernels or not all(isinstance(kernel, Kernel) for kernel in kernels):
        return (), f"{point.value} is no {Kernel.__module__}.{Kernel.__name__}, nor a tuple of them"
    return kernels, None


def _problem(kernel: Kernel, references: Mapping[str, Callable[..., Any]]) -> str | None:
    if not isinstance(kernel.op, str) or kernel.op not in references:
        return f"is of the operation {kernel.op!r}: choose {', '.join(references)}"
    if not callable(kernel.missing):
        return "has a missing that cannot be called"
    return signature_problem(kernel.function, references[kernel.op])


def signature_problem(function: object, reference: Callable[..., Any]) -> str | None:
    """Why a function cannot be called as `reference` is, or None if it can, as far as one sees."""
    if not callable(function):
        return "is no function"
    names = list(inspect.signature(reference).parameters)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some of those written in C say nothing
        return None
    try:
        signature.bind(*names)
    except TypeError:
        takes = ", ".join(signature.parameters)
        return f"takes ({takes}), and is called with ({', '.join(names)}) by position"
    return None


def load_function(spec: str) -> Callable[..., Any]:
    """Imports a function that is named as `package.module:function`.

    Raises:
        ImplementationError: it cannot be imported, or is none.
    """
    module, _, attribute = spec.partition(":")
    try:
        loaded: Any = import_module(module)
        for name in attribute.split("."):
            loaded = getattr(loaded, name)
    except FOREIGN as error:
        raise ImplementationError(f"cannot load {spec}: {told(error)}") from error
    if not callable(loaded):
        raise ImplementationError(f"{spec} is no function")
    function: Callable[..., Any] = loaded
    return function


def load_point(point: EntryPoint) -> tuple[Any, str | None]:
    """What an entry point stands for, or None and why it cannot be loaded."""
    try:
        return point.load(), None
    except FOREIGN as error:
        return None, f"cannot load {point.value}: {told(error)}"


def reason_of(missing: Callable[[], object]) -> str | None:
    """Asks a registered `missing` why something cannot run here: one line, or None if it can."""
    try:
        reason = missing()
    except FOREIGN as error:
        return f"its missing() failed: {told(error)}"
    if reason is None:
        return None
    if not isinstance(reason, str) or not reason.strip():
        return f"its missing() gave {one_line(repr(reason))}, not None or a line of text"
    return one_line(reason)


class Named(Protocol):
    """What a package registers, as `find_named` looks for it."""

    @property
    def name(self) -> str: ...

    @property
    def package(self) -> str: ...

    @property
    def problem(self) -> str | None: ...


N = TypeVar("N", bound=Named)


def find_named(asked: str, installed: Iterable[N], what: str, choices: str) -> N:
    """The registration that a recipe names.

    Args:
        asked: its name, or `name@package`.
        installed: what packages register; of several with the name one that can be used.
        what: it, as in messages, with `{}` for its name.
        choices: which there are, likewise.

    Raises:
        ImplementationError: it cannot be used; the line says which package is missing or at fault.
        KeyError: there is none of that name, and no package is named.
    """
    name, _, package = asked.partition("@")
    found = [one for one in installed if one.name == name]
    if package:
        found = [one for one in found if same_package(one.package, package)]
    found.sort(key=lambda one: one.problem is not None)
    if found:
        if found[0].problem is not None:
            raise ImplementationError(found[0].problem)
        return found[0]
    if not package:
        raise KeyError(asked)
    if is_installed(package):
        why = f"package {package} registers no {what.format(repr(name))}"
    else:
        why = f"{name!r} comes with the package {package}, which is not installed here"
    raise ImplementationError(f"{why}; there is {choices}")


def is_installed(package: str) -> bool:
    """Whether a distribution of that name is installed."""
    try:
        distribution(package)
    except (PackageNotFoundError, ValueError):  # ValueError: no name at all
        return False
    return True


def same_package(one: str, other: str) -> bool:
    """Whether two names are those of one distribution: `my_kernels` and `My-Kernels` are."""
    spellings = {re.sub(r"[-_.]+", "-", name).lower() for name in (one, other)}
    return len(spellings) == 1


def errors_of_kernels() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not compile, does not fit the device, or fails on it."""
    if find_spec("triton") is None:
        return BROKEN
    from triton.errors import TritonError

    return (*BROKEN, TritonError)


def told(error: BaseException) -> str:
    """An error of foreign code in one line, with its kind unless it is a usual one."""
    text, kind = one_line(error), type(error).__name__
    return text if isinstance(error, BROKEN) or text == kind else f"{kind}: {text}"


def raised(error: BaseException) -> str:
    """An error of foreign code in one line: its kind, its message, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"it raised {type(error).__name__}: {one_line(error)[:300]}{where}"


def one_line(error: object) -> str:
    """The message of an error in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def by_name(point: EntryPoint) -> tuple[str, str]:
    """The order in which entry points are loaded."""
    return point.name, package_of(point)


def package_of(point: EntryPoint) -> str:
    """The distribution that registers an entry point."""
    return point.dist.name if point.dist is not None else "of unknown name"
