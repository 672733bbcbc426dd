"""`alignlab report`: the report of finished comparisons again, or of some of them as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignlab.errors import UserError
from alignlab.experiments.compare.outputs import (
    COMPARISON,
    read_comparison,
    rewrite_outputs,
    write_outputs,
)
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.compare.subset import clips_are_there, moved, subset
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
        UserError: as `chosen`; `out` is missing, cannot be written, or holds a comparison that is
            no such report; clips that a report has now are gone.
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
        return _in_place(paths[0])
    with out_folder(out):
        _refuse_others_folder(paths, out)
        comparison = chosen(paths, out, choice)
        out.mkdir(parents=True, exist_ok=True)
        return comparison, write_outputs(comparison, out)


def _in_place(path: Path) -> tuple[Comparison, Path]:
    """The report of a folder anew, with nothing that it has now left out."""
    comparison, folder = read_comparison(path)
    if path.is_file() and path.name != COMPARISON:
        raise UserError(
            f"--out: missing; {path} is not the {COMPARISON} of its folder, whose report would be "
            "written"
        )
    check_out_folder(folder, None)
    lost = [run for run in comparison.results if not clips_are_there(run, folder)]
    if lost and (folder / "report.html").is_file():
        raise UserError(
            f"{folder}: clips of {lost[0].variant} with seed {lost[0].seed} are not there, and its "
            "report.html would lose them: give another folder as --out"
        )
    return rewrite_outputs(folder)


def _refuse_others_folder(paths: Sequence[Path], out: Path) -> None:
    """Refuses to write over a comparison: only an earlier report may be replaced.

    The runs of a report lie in the folders of others.
    """
    if any(out.glob("*/seed-*/recipe.yaml")):
        raise UserError(f"--out: {out} is where a comparison trained: choose another --out")
    for path in paths:
        _, folder = read_comparison(path)
        if folder.resolve() == out.resolve():
            raise UserError(f"--out: {out} is what is to be reported on: choose another --out")
    if (out / COMPARISON).is_file():
        there, _ = read_comparison(out)
        if not all(run.run_dir.startswith("..") for run in there.results):
            raise UserError(f"--out: {out} holds a comparison of its own: choose another --out")


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
