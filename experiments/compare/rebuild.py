"""`alignlab report`: the report of finished comparisons again, or of some of them as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignlab.errors import UserError
from alignlab.experiments.compare.outputs import read_comparison, rewrite_outputs, write_outputs
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.compare.subset import moved, subset
from alignlab.runs.out_paths import check_out_folder, out_folder


@dataclass(frozen=True)
class Choice:
    """What a report is about; None for all, and for the comparisons' own baseline.

    Args:
        variants, seeds, metrics, baseline: as `subset` has them.
    """

    variants: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    metrics: tuple[str, ...] | None = None
    baseline: str | None = None

    @property
    def options(self) -> list[str]:
        """The options of the command that were given."""
        return [f"--{name}" for name, value in vars(self).items() if value is not None]


def rebuild(
    paths: Sequence[Path], out: Path | None, choice: Choice | None = None
) -> tuple[Comparison, Path]:
    """Writes the report of one comparison, or of several as one; nothing is trained.

    Args:
        paths: folders of comparisons, or the comparison.json in each.
        out: folder to write; None: that of the only comparison, whose report is then of all of it.
        choice: what the report is about; None: all.

    Returns:
        What the report is about, and its path.

    Raises:
        UserError: as `chosen`; `out` is missing, cannot be written, or is where a comparison
            trained.
    """
    choice = choice or Choice()
    if out is None:
        if len(paths) > 1:
            raise UserError(
                f"--out: missing; the report of {len(paths)} comparisons needs a folder"
            )
        if choice.options:
            raise UserError(
                f"--out: missing; with {choice.options[0]}, {paths[0]} would lose the rest of its "
                "comparison"
            )
        _, folder = read_comparison(paths[0])
        check_out_folder(folder, "FOLDER")
        return rewrite_outputs(folder)
    with out_folder(out):
        if any(out.glob("*/seed-*/recipe.yaml")):
            raise UserError(f"--out: {out} is where a comparison trained: choose another --out")
        comparison = chosen(paths, out, choice)
        out.mkdir(parents=True, exist_ok=True)
        return comparison, write_outputs(comparison, out)


def chosen(paths: Sequence[Path], target: Path | None, choice: Choice) -> Comparison:
    """The comparison of one folder, or of several as one, with what a report is about.

    Args:
        paths: as `rebuild` has them.
        target: folder to which those of the runs are relative; None: nothing is written.
        choice: what the report is about.

    Raises:
        UserError: no such comparison, variant, seed or metric; comparisons that are not alike.
    """
    found = [read_comparison(path) for path in paths]
    # the same folder twice is one
    sources = list({folder.resolve(): (folder, one) for one, folder in found}.values())
    if len(sources) == 1:
        folder, one = sources[0]
        comparison = moved(one, folder, target)
    else:
        # Here: it reads recipes, which loads torch.
        from alignlab.experiments.compare.merge import merged

        comparison = merged([(f, one) for f, one in sources], target, baseline=choice.baseline)
    return subset(
        comparison,
        variants=choice.variants,
        seeds=choice.seeds,
        baseline=choice.baseline,
        metrics=choice.metrics,
    )
