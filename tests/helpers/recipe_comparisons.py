"""Comparisons of a real recipe whose runs nobody trained: the numbers follow from variant and seed.

A run has the same numbers in every comparison that has it.
"""

import dataclasses
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from alignlab.evaluation.collectors import with_means
from alignlab.experiments.compare.config import CompareConfig, dump_compare, load_compare
from alignlab.experiments.compare.fairness import differences
from alignlab.experiments.compare.outputs import write_outputs
from alignlab.experiments.compare.result import Comparison, RunResult, SampleClip
from made_comparisons import make_comparison

STEPS = 80
EFFECTS = {"none": 0.0, "refalign": -0.02, "repa": 0.03, "irepa": 0.0, "videorepa": -0.05}


def recipe_comparison(
    variants: Sequence[str] = ("none", "refalign"),
    seeds: Sequence[int] = (0, 1, 2),
    overrides: Sequence[str] = (),
    blocks: Sequence[int] = (0, 1),
    **fields: object,
) -> Comparison:
    """A comparison of the recipe `demo`, of these variants and seeds.

    Args:
        variants: of `EFFECTS`.
        seeds: of the runs.
        overrides: of the recipe.
        blocks: that were measured.
        fields: of the comparison.
    """
    config = _config(tuple(variants), tuple(seeds), tuple(overrides))
    runs = [run_of(variant, seed, blocks) for seed in seeds for variant in variants]
    known: dict[str, object] = {
        "name": config.name,
        "baseline": config.baseline,
        "variants": tuple(variants),
        "seeds": tuple(seeds),
        "recipe": dump_compare(config),
        "differing": differences(config),
        "environment": {"torch": "2.13.0", "device": "cpu", "threads": "1"},
    }
    return make_comparison(runs, **(known | fields))


def run_of(variant: str, seed: int, blocks: Sequence[int] = (0, 1)) -> RunResult:
    """The run of a variant with a seed."""
    base, own = random.Random(seed), random.Random(f"{variant} {seed}")
    flow = base.uniform(0.3, 0.5) + EFFECTS[variant] + own.gauss(0.0, 0.002)
    metrics = {"val/flow": flow, "val/flow/t0": flow / 2, "val/flow/t7": 2 * flow}
    for block in range(8):
        cosine = base.uniform(0.2, 0.3) - block / 20 + EFFECTS[variant] * own.uniform(0.8, 1.2)
        if block in blocks:
            metrics[f"cross_cos/block{block}"] = cosine
    metrics = with_means(metrics) | {"time/step": 0.5 + own.uniform(0, 0.1), "params/extra": 3.0}
    measured = {"val/flow": tuple((s, flow + (STEPS - s) / 400) for s in (20, 40, 60, STEPS))}
    measured["val/flow"] = (*measured["val/flow"][:-1], (STEPS, flow))
    curves = {"loss/flow": tuple((s, flow + (STEPS - s) / 300) for s in (1, 40, STEPS))}
    return RunResult(
        variant=variant,
        seed=seed,
        steps=STEPS,
        run_dir=f"{variant}/seed-{seed}",
        metrics=metrics,
        curves=curves,
        measured=measured,
    )


def written(comparison: Comparison, folder: Path, *, clips: bool = False) -> Path:
    """Writes a comparison and its report into a folder that is made; `clips`: with the runs' clips.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    if clips:
        clip = SampleClip("0", "a red circle", "samples/0.mp4")
        runs = [dataclasses.replace(run, samples=(clip,)) for run in comparison.results]
        comparison = dataclasses.replace(comparison, results=tuple(runs))
        for run in comparison.results:
            video = folder / run.run_dir / clip.video
            video.parent.mkdir(parents=True)
            video.write_bytes(f"{run.variant} {run.seed}".encode())
    write_outputs(comparison, folder)
    return folder


@lru_cache
def _config(
    variants: tuple[str, ...], seeds: tuple[int, ...], overrides: tuple[str, ...]
) -> CompareConfig:
    others = [v for v in load_demo().variants if v not in variants]
    return load_compare(
        "demo",
        [f"seeds={list(seeds)}", *(f"variants.{v}=null" for v in others), *overrides],
    )


@lru_cache
def load_demo() -> CompareConfig:
    """The recipe `demo`."""
    return load_compare("demo")
