"""What a path is that was given in place of another kind of thing, and which command takes it.

It goes by names of files alone, and reads nothing: what it looks at may be damaged.
"""

import re
from pathlib import Path
from typing import NamedTuple

_STEP = re.compile(r"(?:step|weights)-\d{6,}")  # and copies of weights
_FILES = {
    "report.html": "the report of a comparison",
    "report.md": "the report of a comparison",
    "sweep.html": "the page of a sweep",
    "comparison.json": "the result of a comparison",
    "trials.csv": "the trials of a sweep",
    "study.db": "the study of a sweep",
    "result.json": "the result of a run",
    "metrics.jsonl": "the log of a run",
}
_FOLDERS = (  # by a file that such a folder has, the surest first
    ("recipe.yaml", "the folder of a run"),
    ("stage1.json", "a Stage 1 network"),
    ("model_index.json", "an exported model or a diffusers pipeline"),
    ("pytorch_lora_weights.safetensors", "an exported LoRA"),
    ("trials.csv", "the folder of a sweep"),
    ("study.db", "the folder of a sweep"),
    ("sweep.html", "the folder of a sweep"),
    ("comparison.json", "the folder of a comparison"),
    ("progress.json", "the folder of a comparison"),
    ("budget.json", "the folder of a comparison"),
)
_BELOW = ("*/seed-*/recipe.yaml", "*/recipe.yaml", "*/*/recipe.yaml")


class PathKind(NamedTuple):
    """What lies at a path.

    Args:
        path: of the thing.
        what: it is, in words.
    """

    path: Path
    what: str

    @property
    def of_several(self) -> bool:
        """Whether it is of a comparison or a sweep, whose folder holds runs."""
        return self.what.endswith(("comparison", "sweep"))

    @property
    def folder(self) -> Path:
        """The folder itself, or the one that the file lies in."""
        return self.path if self.path.is_dir() else self.path.parent


def kind_of(path: Path) -> PathKind | None:
    """What alignlab wrote at a path; None for anything else, and for nothing."""
    if path.is_file():
        what = _FILES.get(path.name)
        return PathKind(path, what) if what else None
    if not path.is_dir():
        return None
    if _STEP.fullmatch(path.name) and path.parent.name == "checkpoints":
        return PathKind(path, "a checkpoint")
    for name, what in _FOLDERS:
        if (path / name).exists():
            return PathKind(path, what)
    if _a_run_below(path) is not None:
        return PathKind(path, "a folder with runs in it")
    return None


def not_a_recipe(path: Path) -> str | None:
    """Of a path that was given as a recipe: what it is, and what to do; None: not known.

    Args:
        path: a folder or a file.
    """
    kind = kind_of(path)
    if kind is None:
        return f"{path} is a folder, not a recipe: name a YAML file" if path.is_dir() else None
    what, folder = kind.what, kind.folder
    if (folder / "recipe.yaml").is_file():
        fix = f"its recipe is {folder / 'recipe.yaml'}"
    elif what.endswith("sweep") and (folder / "best.yaml").is_file():
        fix = f"the recipe of its best trial is {folder / 'best.yaml'}"
    elif kind.of_several:
        fix = f"name the recipe that made it; `alignlab verify {folder}` checks its files"
    elif what == "a checkpoint":
        fix = f"its run's recipe is {folder.parents[1] / 'recipe.yaml'}; {_start_from(folder)}"
    elif what == "a Stage 1 network":
        fix = f"{_stage1(folder)}"
    elif "model" in what:
        fix = f"a recipe starts from it by model.path={folder}"
    elif what == "an exported LoRA":
        fix = "diffusers loads it by pipeline.load_lora_weights"
    else:
        fix = "name the recipe.yaml in one of them"
    return f"{path} is {what}, not a recipe: {fix}"


def not_a_run(path: Path) -> str | None:
    """Of a path that was given as a run's folder: what it is, and what to do; None: not known.

    Args:
        path: a folder or a file that is no run's.
    """
    kind = kind_of(path)
    if kind is None:
        if path.name == "recipe.yaml" and path.is_file():
            return f"{path} is the recipe of a run, not its folder: name {path.parent}"
        if path.is_file() and path.suffix in (".yaml", ".yml"):
            return f"{path} is a recipe, not a run: `alignlab train {path}` makes the run"
        return None
    what, folder = kind.what, kind.folder
    if what == "the folder of a run":
        return None
    if (folder / "recipe.yaml").is_file():
        fix = f"name {folder}"
    elif kind.of_several or "runs" in what:
        run = _a_run_below(folder)
        fix = f"name one of its runs, such as {run}" if run else "it holds no run"
    elif what == "a checkpoint":
        step = int(folder.name.rpartition("-")[2])
        fix = f"name {folder.parents[1]}, with --checkpoint {step} where the command has it"
    elif what == "a Stage 1 network":
        fix = _stage1(folder)
    elif "model" in what:
        fix = f"a recipe starts from it by model.path={folder}"
    else:
        fix = "diffusers loads it by pipeline.load_lora_weights"
    return f"{path} is {what}, not a run: {fix}"


def not_a_folder(path: Path) -> str | None:
    """Of a path that was given as the folder of a run, a comparison or a sweep, or of several: what
    it is, and what to do; None: not known.

    Args:
        path: a file, a folder without any of them, or nothing.
    """
    kind = kind_of(path)
    if kind is None:
        if path.is_file() and path.suffix in (".yaml", ".yml"):
            name = "name the folder that its command wrote: OUTPUT/NAME, as the recipe says them"
            if path.name == "recipe.yaml":  # beside what was written
                name = f"name {path.parent}"
            return f"{path} is a recipe, not a folder: {name}"
        return None if path.is_dir() or not path.exists() else f"{path} is a file, not a folder"
    if path.is_file():
        return f"{path} is {kind.what}, not its folder: name {kind.folder}"
    if kind.what == "a checkpoint":
        return f"{path} is a checkpoint, not the folder of its run: name {kind.folder.parents[1]}"
    return None


def _start_from(checkpoint: Path) -> str:
    return f"another run starts from it by model.init_from={checkpoint}"


def _stage1(folder: Path) -> str:
    return f"a recipe reads it by an objective's setting, such as objectives.ALIAS.aligner={folder}"


def _a_run_below(folder: Path) -> Path | None:
    for pattern in _BELOW:
        recipe = next(iter(sorted(folder.glob(pattern))), None)
        if recipe is not None:
            return recipe.parent
    return None
