"""The plans of the shipped recipes: `python -m alignlab.experiments.plan.page [RECIPE...]`.

Run in a checkout. It plans every shipped recipe with the defaults of `alignlab plan`, those that
torchrun starts with as many GPUs as the command at their head says. It writes
`experiments/results/plans.json`, and the tables of it in `docs/scale.md`. `NEED_OTHERS` are planned
once what they read is in `runs/`.
"""

import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from alignlab.config.recipe_file import recipe_folder, shipped_recipes
from alignlab.errors import UserError
from alignlab.experiments.plan.comparison import plan_recipe
from alignlab.experiments.plan.fits import changes_to_fit
from alignlab.experiments.plan.rates import TERA
from alignlab.experiments.plan.recipe_runs import recipe_runs
from alignlab.experiments.plan.table import as_json, number
from alignlab.plan.architecture import Architectures
from alignlab.runs.log_filters import quiet_libraries
from alignlab.units import GIB

MEMORY = 80 * GIB
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
HEADER = (
    *("recipe", "runs", "GPUs of a run", "trained", "TF a step", "peak GiB"),
    *("fits into 80", "GPU-hours", "a checkpoint"),
)
NEED_OTHERS = {
    "tuned_refalign": "alignlab sweep sweep_refalign",
    "tiny_dino/label_free": "python -P tests/campaigns/label_free_teacher.py "
    "runs/label_free_teacher",
}
"""Recipes that read what another training leaves, and how that is made."""
_RANKS = re.compile(r"^# torchrun --nproc-per-node (\d+)", re.MULTILINE)


def gpus_of(name: str) -> int | None:
    """GPUs that torchrun at the head of a shipped recipe trains it with; None: it is not there."""
    ranks = _RANKS.search((recipe_folder() / f"{name}.yaml").read_text("utf-8"))
    return None if ranks is None else int(ranks[1])


def plans(names: Iterable[str]) -> dict[str, Any]:
    """The plans of shipped recipes as plain values, by name; `refused` is why one has none."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        for name in names:
            architectures = Architectures(stack)
            try:
                plan = plan_recipe(recipe_runs(name, []), architectures, gpus=gpus_of(name))
            except UserError as error:
                found[name] = {"recipe": name, "refused": str(error)}
                continue
            highest = plan.highest
            changes = changes_to_fit(highest.config, highest.plan, architectures, MEMORY)
            found[name] = as_json(plan, MEMORY, changes)
    return found


def table(found: Mapping[str, Any]) -> str:
    """The Markdown tables of plans, those of single studies apart, and below them what has none."""
    studies = {name: plan for name, plan in found.items() if "/" in name}
    lines = _rows({name: plan for name, plan in found.items() if name not in studies})
    if studies:
        lines += ["", "Single findings, and what `tiny-dino` was asked:", "", *_rows(studies)]
    for name, plan in found.items():
        if "refused" in plan:
            lines.append(f"\n`{name}` has no plan: {plan['refused']}.")
    return "\n".join(lines)


def _rows(found: Mapping[str, Any]) -> list[str]:
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    for name, plan in found.items():
        if "refused" in plan:
            continue
        highest = max(plan["variants"].values(), key=lambda variant: variant["peak"])
        cells = [
            f"`{name}`",
            plan["sizes"],
            f"{highest['gpus']}",
            f"{number(highest['trained'] / 1e6)} M",
            number(sum(highest["step_flops"].values()) / TERA),
            f"{highest['peak'] / GIB:.3g}",
            _fits(plan),
            number(plan["gpu_hours"]),
            f"{number(highest['checkpoint']['one'] / 1e9)} GB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _fits(plan: Mapping[str, Any]) -> str:
    if plan["fits"]:
        return "yes"
    changes = plan["changes"]
    if not changes or not changes[-1]["fits"]:
        return "no"
    return "with " + ", ".join(f"`{change['settings']}`" for change in changes)


def main() -> None:
    """Plans all and writes both files."""
    logging.getLogger("alignlab").setLevel(logging.WARNING)
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise UserError("the plans of the shipped recipes are written in a checkout")
    found = plans(sys.argv[1:] or shipped_recipes())
    path = root / "experiments" / "results" / "plans.json"
    if sys.argv[1:]:  # these take the place of theirs
        found = json.loads(path.read_text()) | found
    found = {name: found[name] for name in shipped_recipes() if name in found}
    path.write_text(json.dumps(found, indent=1) + "\n")
    page = root / "docs" / "scale.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
