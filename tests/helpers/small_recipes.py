"""Recipes of comparisons and sweeps of the run in `tiny_runs`."""

from pathlib import Path


def without_objectives(recipe: str) -> str:
    """The text of a recipe with one objective, without it."""
    lines = recipe.split("\n")
    start = lines.index("objectives:")
    return "\n".join(lines[:start] + lines[start + 2 :])


def comparison_recipe(recipe_file: Path, path: Path, variants: str) -> Path:
    """Writes a comparison to `path`, named as that file, whose baseline has no objective.

    Args:
        recipe_file: of a run.
        variants: what a comparison adds to it.
    """
    shared = without_objectives(recipe_file.read_text())
    path.write_text(shared.replace("name: run", f"name: {path.stem}") + variants)
    return path


def sweep_recipe(recipe_file: Path, path: Path, sweep: str) -> Path:
    """Writes a sweep to `path`, named as that file.

    Args:
        recipe_file: of a run.
        sweep: what a sweep adds to it.
    """
    path.write_text(recipe_file.read_text().replace("name: run", f"name: {path.stem}") + sweep)
    return path
