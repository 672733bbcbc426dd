"""How often fewer seeds would have claimed what a comparison of many seeds claims; by hand.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -P tests/campaigns/claims_of_subsets.py FOLDER
        [--sizes 3 5] [--metrics val/flow steps_to_target]

Every subset of so many seeds of the comparison in FOLDER (its comparison.json) is reported as a
comparison of its own, with its own Holm's correction. A row says in what share of them a variant
is claimed to be better or worse. Subsets share seeds: ten seeds have 120 subsets of three, but
tell no more than ten seeds do, so that such a share has no sampling error that could be computed.
"""

import argparse
import dataclasses
import itertools
from collections import Counter
from pathlib import Path

from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.summary import summary_rows


def of_seeds(comparison: Comparison, seeds: tuple[int, ...]) -> Comparison:
    """The comparison as if it had been made with these of its seeds."""
    results = tuple(run for run in comparison.results if run.seed in seeds)
    return dataclasses.replace(comparison, seeds=seeds, results=results)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--metrics", nargs="+", default=["val/flow", "steps_to_target"])
    options = parser.parse_args()
    comparison = Comparison.load(options.folder / "comparison.json")
    for size in options.sizes:
        claims: Counter[tuple[str, str, str]] = Counter()
        subsets = list(itertools.combinations(comparison.seeds, size))
        for seeds in subsets:
            for row in summary_rows(of_seeds(comparison, seeds)):
                if row.metric in options.metrics and not row.is_baseline:
                    claims[row.metric, row.variant, row.change or "nothing"] += 1
        print(f"{len(subsets)} subsets of {size} of {len(comparison.seeds)} seeds")
        for metric, variant in sorted({key[:2] for key in claims}):
            shares = (
                f"{change} {claims[metric, variant, change] / len(subsets):6.1%}"
                for change in ("better", "worse", "nothing")
            )
            print(f"  {metric:16} {variant:12} {'  '.join(shares)}", flush=True)


if __name__ == "__main__":
    main()
