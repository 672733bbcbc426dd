"""The layout holds: imports go one way, nothing shadows another package, every file is packaged."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from alignlab.losses.objective import Objective
from alignlab.losses.registry import BUILT_IN

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "losses", "alignlab", "experiments")
# A file may import modules of its own rank and of lower ones.
RANKS = {
    "alignlab.kernels": 0,
    "alignlab.losses": 1,
    "alignlab": 2,
    "alignlab.experiments": 3,
    "alignlab.cli": 4,
    "alignlab.__main__": 5,
}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
# `cli.py` assembles the commands of all rooms.
HARNESS = [p for p in SOURCES if p.is_relative_to(ROOT / "alignlab") and p.name != "cli.py"]
MAX_LINES = 500
MAX_FUNCTION_LINES = 59
# What is built on single runs belongs to experiments/.
EXPERIMENT_WORDS = frozenset(
    "compare comparison comparisons variant variants sweep sweeps budget budgets report reports "
    "page pages".split()
)


def faulty(paths: list[Path], faults: Callable[[Path], object]) -> dict[str, object]:
    """Files with faults, by name: one test for all files costs a tenth of one for each."""
    found = {str(path.relative_to(ROOT)): faults(path) for path in paths}
    return {name: its_faults for name, its_faults in found.items() if its_faults}


@cache
def nodes_of(source: str) -> list[ast.AST]:
    """Of a file's tree, each once: several checks read them, and none changes any."""
    return list(ast.walk(ast.parse(source)))


@pytest.fixture(scope="module", autouse=True)
def _trees_are_forgotten() -> Iterator[None]:
    """Else every collection of garbage after these tests looks through them."""
    yield
    nodes_of.cache_clear()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "alignlab" else ("alignlab", *parts))


def rank(module: str) -> int:
    parents = [module.rsplit(".", n)[0] for n in range(module.count(".") + 1)]
    return next(RANKS[parent] for parent in parents if parent in RANKS)


def imported(nodes: list[ast.AST]) -> Iterator[str]:
    """Every module of this project that statements among these import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # `from alignlab import experiments` imports the room, so the names count as well.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "alignlab")


def wrong_way(module: str, source: str) -> list[str]:
    return [name for name in imported(nodes_of(source)) if rank(name) > rank(module)]


def broad_handlers(source: str) -> list[int]:
    """Lines of `except:` and `except Exception` that do not raise the error again."""
    return [
        node.lineno
        for node in nodes_of(source)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None)
    ]


def unsafe_loads(source: str) -> list[int]:
    """Lines of `torch.load` calls that would run a pickle."""
    return [
        node.lineno
        for node in nodes_of(source)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func) == "torch.load"
        and not any(
            k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
        )
    ]


def test_no_file_imports_a_later_room() -> None:
    assert faulty(SOURCES, lambda path: wrong_way(module_of(path), path.read_text())) == {}


def test_no_file_catches_everything() -> None:
    assert faulty(SOURCES, lambda path: broad_handlers(path.read_text())) == {}


def test_no_file_loads_pickles() -> None:
    assert faulty(SOURCES, lambda path: unsafe_loads(path.read_text())) == {}


def test_files_are_short_and_named_by_what_they_are() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
    assert [path for path in SOURCES if path.name in ("utils.py", "helpers.py")] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("alignlab.kernels.x", "from alignlab.losses import OBJECTIVES"),
        ("alignlab.losses.x", "from alignlab.errors import UserError"),
        ("alignlab.losses.x", "def f():\n    import alignlab.train"),
        ("alignlab.train", "from alignlab import experiments"),
        ("alignlab.train", "import alignlab.experiments.compare.run as c"),
        ("alignlab.experiments.compare.run", "from alignlab.cli import app"),
    ],
)
def test_a_wrong_way_import_is_seen(module: str, source: str) -> None:
    assert len(wrong_way(module, source)) == 1
    assert wrong_way("alignlab.cli", source) == []


def test_bad_handlers_and_loads_are_seen() -> None:
    assert broad_handlers("try: f()\nexcept Exception: pass") == [2]
    assert broad_handlers("try: f()\nexcept: pass") == [2]
    assert broad_handlers("try: f()\nexcept BaseException:\n    g()\n    raise") == []
    assert unsafe_loads("torch.load(p)\ntorch.load(p, weights_only=True)") == [1]


def test_kernels_is_a_namespace_folder() -> None:
    assert not list((ROOT / "kernels").rglob("__init__.py"))


def test_tests_are_no_packages_and_have_unique_names() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_hugging_face_works_from_the_repository_root() -> None:
    # The root is first on sys.path there, where kernels/ could pass for Hugging Face's `kernels`.
    code = "from diffusers import WanTransformer3DModel; from transformers import T5EncoderModel"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_package_is_listed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {module_of(path.with_name("x.py")).removesuffix(".x") for path in SOURCES}
    assert set(setuptools["packages"]) == folders
    for package, folder in setuptools["package-dir"].items():
        assert package == ("alignlab" if folder == "alignlab" else f"alignlab.{folder}")


@pytest.mark.parametrize("room", ["kernels", "losses", "experiments"])
def test_type_checkers_find_the_rooms(room: str) -> None:
    link = ROOT / "typings" / "alignlab" / room
    assert link.is_symlink() and link.resolve() == ROOT / room
    assert not (link.parent / "__init__.py").exists()


def long_functions(source: str) -> list[str]:
    """Functions of too many lines, decorators not counted; Triton kernels may be long."""
    return [
        node.name
        for node in nodes_of(source)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
        and not any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)
    ]


def identifiers(source: str) -> Iterator[str]:
    """Every name in a file's code: of modules, classes, functions, arguments, attributes."""
    for node in nodes_of(source):
        if isinstance(node, ast.Constant):
            continue
        for _, value in ast.iter_fields(node):
            names = value if isinstance(value, list) else [value]
            yield from (name for name in names if isinstance(name, str))


def experiment_names(source: str) -> list[str]:
    """Identifiers with a word of the room `experiments`, split at underscores and camel case."""
    return sorted(
        {
            name
            for name in identifiers(source)
            for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
            if word.lower() in EXPERIMENT_WORDS
        }
    )


def test_functions_are_short() -> None:
    assert faulty(SOURCES, lambda path: long_functions(path.read_text())) == {}


def test_a_long_function_is_seen() -> None:
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert long_functions(f"def f():\n{body}") == []
    assert long_functions(f"def f():\n{body}    x = 2\n") == ["f"]
    assert long_functions(f"class A:\n @cached\n async def g(self):\n{body}    x = 2\n") == ["g"]
    assert long_functions(f"@triton.jit(debug=True)\ndef kernel(x):\n{body}    x = 2\n") == []


def test_the_harness_knows_nothing_of_experiments() -> None:
    assert faulty(HARNESS, lambda path: experiment_names(path.read_text())) == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def compare(): pass", ["compare"]),
        ("def f(max_budget): pass", ["max_budget"]),
        ("class SweepConfig: pass", ["SweepConfig"]),
        ("HTMLReport = 1", ["HTMLReport"]),
        ("x.variants = f(page=1)", ["page", "variants"]),
        ("import a.comparison as b", ["a.comparison"]),
        ("from a.reports import b", ["a.reports"]),
        ("from a import b as sweeps", ["sweeps"]),
        ("def f():\n    global pages", ["pages"]),
        ('"""Compare variants."""\nx = "report"  # sweep', []),
        ("comparable = reporter = homepage = pagesize = invariant = 1", []),
    ],
)
def test_a_name_of_experiments_is_seen(source: str, names: list[str]) -> None:
    assert experiment_names(source) == names


MODULES = {module_of(path): path for path in SOURCES}


def imported_files(module: str) -> set[str]:
    """Files of this project that are imported with a module, not only when a function runs."""
    tree = ast.parse(MODULES[module].read_text())
    statements: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = set(imported(list(statements)))
    return {file for name in names for file in (name, name.rpartition(".")[0]) if file in MODULES}


def longest_import_chain(module: str) -> list[str]:
    chains = [longest_import_chain(name) for name in sorted(imported_files(module))]
    return [module, *max(chains, key=len, default=[])]


@pytest.mark.parametrize("objective", BUILT_IN.values(), ids=list(BUILT_IN))
def test_import_closure_of_a_loss_file_is_at_most_3_deep(objective: type[Objective]) -> None:
    assert len(longest_import_chain(objective.__module__)) - 1 <= 3


def test_an_import_chain_is_followed_to_its_end() -> None:
    chain = longest_import_chain("alignlab.losses.sara")
    assert chain[0] == "alignlab.losses.sara" and len(chain) == 4
    assert all(later in imported_files(module) for module, later in pairwise(chain))
    assert not imported_files(chain[-1])
