"""The plans of the shipped recipes: `python -m alignlab.experiments.plan.page`.

Run in a checkout. It plans every shipped run and comparison with the defaults of `alignlab plan`,
writes `experiments/results/plans.json`, and the table of it in `docs/scale.md`.
"""

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from alignlab.config.recipe_file import read_recipe, shipped_recipes
from alignlab.errors import UserError
from alignlab.experiments.plan.comparison import plan_recipe, recipe_runs
from alignlab.experiments.plan.fits import GIB, changes_to_fit
from alignlab.experiments.plan.table import TERA, as_json
from alignlab.plan.architecture import Architectures
from alignlab.runs.log_filters import quiet_libraries

MEMORY = 80 * GIB
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
HEADER = (
    *("recipe", "runs", "trained", "TF a step", "peak GiB"),
    *("80 GB cards", "GPU-hours", "a checkpoint"),
)


def planned_recipes() -> list[str]:
    """Shipped recipes that train a run or a comparison; those of single findings are left out."""
    found = []
    for name in shipped_recipes():
        mapping = read_recipe(name, [])
        if "/" not in name and "space" not in mapping and "stage1" not in mapping:
            found.append(name)
    return found


def plans(names: Iterable[str]) -> dict[str, Any]:
    """The plans of shipped recipes as plain values, by name."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        for name in names:
            architectures = Architectures(stack)
            plan = plan_recipe(recipe_runs(name, []), architectures)
            highest = plan.highest
            changes = changes_to_fit(highest.config, highest.plan, architectures, MEMORY)
            found[name] = as_json(plan, MEMORY, changes)
    return found


def table(found: Mapping[str, Any]) -> str:
    """The Markdown table of plans."""
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    for name, plan in found.items():
        highest = max(plan["variants"].values(), key=lambda variant: variant["peak"])
        cells = [
            f"`{name}`",
            f"{len(plan['variants'])} x {plan['seeds']}",
            f"{highest['trained'] / 1e6:,.4g} M",
            f"{sum(highest['step_flops'].values()) / TERA:,.4g}",
            f"{highest['peak'] / GIB:.3g}",
            _cards(plan, highest),
            f"{plan['gpu_hours']:,.3g}",
            f"{highest['checkpoint']['one'] / 1e9:.3g} GB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cards(plan: Mapping[str, Any], highest: Mapping[str, Any]) -> str:
    if plan["fits"]:
        return "1"
    sharded = highest["cards_when_sharded"]
    return f"{sharded} (sharded)" if sharded else "more than 64"


def main() -> None:
    """Plans all and writes both files."""
    logging.getLogger("alignlab").setLevel(logging.WARNING)
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise UserError("the plans of the shipped recipes are written in a checkout")
    found = plans(sys.argv[1:] or planned_recipes())
    path = root / "experiments" / "results" / "plans.json"
    if sys.argv[1:]:  # these take the place of theirs
        found = json.loads(path.read_text()) | found
    path.write_text(json.dumps(found, indent=1) + "\n")
    page = root / "docs" / "scale.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
