"""The warnings of the runs (`notes` in result.json), gathered over seeds."""

from collections.abc import Mapping, Sequence

from alignlab.experiments.compare.result import Comparison


def warnings_by_variant(comparison: Comparison) -> dict[str, list[str]]:
    """Warnings of each variant that has any, in order of the recipe; see `gather_warnings`."""
    by_variant = {}
    for variant in comparison.variants:
        runs = {seed: comparison.run(variant, seed) for seed in comparison.seeds}
        warnings = {seed: run.notes for seed, run in runs.items() if run is not None}
        texts = gather_warnings(warnings, len(comparison.seeds))
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
