"""The warnings of the runs (`notes` in result.json), gathered over seeds, and of their tuning."""

from collections.abc import Mapping, Sequence

from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.tuning import border_warnings


def warnings_by_variant(comparison: Comparison) -> dict[str, list[str]]:
    """Warnings of each variant that has any, in order of the recipe; see `gather_warnings`.

    Those of its tuning come first.
    """
    by_variant = {}
    for variant in comparison.variants:
        runs = {seed: comparison.run(variant, seed) for seed in comparison.seeds}
        warnings = {seed: run.notes for seed, run in runs.items() if run is not None}
        texts = border_warnings(comparison, variant)
        texts += gather_warnings(warnings, len(comparison.seeds))
        if texts:
            by_variant[variant] = texts
    return by_variant


def warning_sentences(comparison: Comparison) -> list[str]:
    """The same as one list: "variant refalign, seeds 0 and 2: ..."."""
    colon = ": " if len(comparison.seeds) == 1 else ", "
    return [
        f"variant {variant}{colon}{text}"
        for variant, texts in warnings_by_variant(comparison).items()
        for text in texts
    ]


def diverged_seeds(comparison: Comparison, variant: str) -> list[int]:
    """Seeds whose validation loss ended far above its start: nothing else is to be read of them."""
    runs = {seed: comparison.run(variant, seed) for seed in comparison.seeds}
    return [seed for seed, run in runs.items() if run is not None and run.diverged]


def aligned_footnotes(comparison: Comparison) -> list[str]:
    """One sentence: in what share of samples the objectives of each variant aligned something.

    Nothing where no run has counted, as in older results.
    """
    parts = []
    for variant in comparison.variants:
        counts: dict[str, list[int]] = {}
        for run in comparison.results:
            if run.variant == variant:
                for alias, (aligned, samples) in run.aligned.items():
                    total = counts.setdefault(alias, [0, 0])
                    total[0] += aligned
                    total[1] += samples
        shares = [
            f"{alias} {_share(aligned, samples)} of {samples:,}"
            for alias, (aligned, samples) in counts.items()
        ]
        if shares:
            parts.append(f"{variant}: {', '.join(shares)}")
    if not parts:
        return []
    return [
        "Samples in which an objective had something to align, of those in steps where its "
        f"schedule was on, all seeds together: {'; '.join(parts)}. Others were trained without it: "
        "their references were dropped or missing, or its gate was 0."
    ]


def _share(aligned: int, samples: int) -> str:
    """In percent, and 0% and 100% only where it is exactly that."""
    if aligned <= 0 or aligned >= samples:
        return "100%" if aligned > 0 else "0%"
    return f"{min(max(100 * aligned / samples, 0.1), 99.9):.1f}%"


def gather_warnings(warnings: Mapping[int, Sequence[str]], num_seeds: int) -> list[str]:
    """One text per warning, with the seeds that gave it and what each of them measured.

    Args:
        warnings: of all runs, by seed. The brackets at the end of a warning hold its numbers;
            warnings that agree in the rest are one.
        num_seeds: of the recipe; a single one is not named.
    """
    measured: dict[str, dict[int, str]] = {}
    for seed, texts in warnings.items():
        for text in texts:
            what, bracket, numbers = text.rpartition(" [")
            if not bracket or not numbers.endswith("]"):
                what, numbers = text, ""
            measured.setdefault(what, {})[seed] = numbers.removesuffix("]")
    return [_text(what, by_seed, num_seeds) for what, by_seed in measured.items()]


def _text(what: str, by_seed: dict[int, str], num_seeds: int) -> str:
    if num_seeds == 1:
        (numbers,) = by_seed.values()
        return what + (f" ({numbers})" if numbers else "")
    parts = [f"seed {seed}: {numbers}" for seed, numbers in by_seed.items() if numbers]
    if len(by_seed) == 1:
        parts = [numbers for numbers in by_seed.values() if numbers]
    return f"{_seeds(by_seed, num_seeds)}: {what}" + (f" ({'; '.join(parts)})" if parts else "")


def _seeds(by_seed: dict[int, str], num_seeds: int) -> str:
    if len(by_seed) == num_seeds:
        return "both seeds" if num_seeds == 2 else f"all {num_seeds} seeds"
    *others, last = map(str, by_seed)
    return f"seeds {', '.join(others)} and {last}" if others else f"seed {last}"
