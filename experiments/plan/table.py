"""A plan as tables on the terminal and as plain values."""

from collections.abc import Iterator, Sequence
from typing import Any

from alignlab.dataset_cache.disk_room import size_text
from alignlab.experiments.plan.comparison import RecipePlan, VariantPlan
from alignlab.experiments.plan.fits import Change
from alignlab.experiments.plan.rates import TERA
from alignlab.plan.sizes import ASIDE, GATHERED, Phase
from alignlab.units import GIB

ACTIVATIONS = "activations"
_STATE = ("weights", "gradients", "optimizer state", "moving averages")
_OTHERS = (
    *("teachers", "text encoder", "autoencoder", "CUDA context", "encoding a clip"),
    *("decoding a clip", "features", "captions", "averaging of gradients"),
    *(ASIDE, GATHERED),
)

Table = tuple[str, Sequence[str], list[list[str]]]
"""Title, header, rows."""


def plan_tables(plan: RecipePlan, memory: int, changes: Sequence[Change]) -> Iterator[Table]:
    """What `alignlab plan` prints.

    Args:
        plan: of the recipe.
        memory: bytes of a GPU.
        changes: that make the variant fit which needs most.
    """
    yield _variants(plan, memory)
    yield _operations(plan)
    yield _memory(plan.highest)
    yield _bytes(plan)
    days = [[f"{gpus}", number(count)] for gpus, count in plan.days.items()]
    yield f"Days ({number(plan.hours)} GPU-hours in all)", ("GPUs", "days"), days
    if changes:
        rows = [[change.settings, gib(change.peak), _yes(change.fits)] for change in changes]
        header = ("change, after those above", "peak GiB", "fits")
        yield f"To fit into {gib(memory)} GiB, in this order", header, rows


def plan_lines(plan: RecipePlan, memory: int, changes: Sequence[Change]) -> Iterator[str]:
    """What is said below the tables."""
    highest = plan.highest.plan
    if highest.peak.total <= memory:
        room = memory - highest.peak.total
        yield f"fits: {gib(highest.peak.total)} of {gib(memory)} GiB, {gib(room)} left"
    elif changes and changes[-1].fits:
        yield f"does not fit into {gib(memory)} GiB: change first {changes[0].settings}"
    elif changes:
        yield f"does not fit into {gib(memory)} GiB, nor with all of these changes"
    else:
        yield f"does not fit into {gib(memory)} GiB, and no setting of a plan changes that"
    yield plan.rates.assumption
    yield from plan.notes
    for encoding in plan.encodings:
        if not encoding.is_known:
            yield (
                f"the recipe does not say how many clips there are: {encoding.clips:,} are "
                "counted, as many as are drawn; --clips N says it"
            )


def as_json(plan: RecipePlan, memory: int, changes: Sequence[Change]) -> dict[str, Any]:
    """The plan as plain values: bytes, operations, hours."""
    return {
        "recipe": plan.runs.name,
        "kind": plan.runs.kind,
        "sizes": plan.runs.sizes,
        "gpus": plan.gpus,
        "memory": memory,
        "tflops": {"bf16": plan.rates.bf16, "fp32": plan.rates.fp32},
        "fits": plan.highest.plan.peak.total <= memory,
        "changes": [
            {"settings": change.settings, "peak": change.peak, "fits": change.fits}
            for change in changes
        ],
        "variants": {name: _variant_json(one) for name, one in plan.variants.items()},
        "clips": [
            {"count": one.clips, "is_known": one.is_known, "cached": one.bytes_per_clip}
            for one in plan.encodings
        ],
        "encoding_hours": plan.encoding_hours,
        "gpu_hours": plan.hours,
        "days": {str(gpus): count for gpus, count in plan.days.items()},
        "cache": plan.cache_bytes,
        "checkpoints": _checkpoints(plan),
        "notes": [plan.rates.assumption, *plan.notes],
    }


def gib(size: float) -> str:
    """Bytes in GiB, three digits."""
    return f"{size / GIB:.3g}"


def number(value: float) -> str:
    """Three digits, nothing below a hundredth."""
    if value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def memory_parts(phase: Phase) -> dict[str, int]:
    """Bytes of a peak by what is reported: what operations of a step hold are its activations."""
    found: dict[str, int] = {}
    for part, size in phase.parts.items():
        name = part if part in (*_STATE, *_OTHERS) else ACTIVATIONS
        found[name] = found.get(name, 0) + size
    return dict(sorted(found.items(), key=lambda row: -row[1]))


def _variant_json(variant: VariantPlan) -> dict[str, Any]:
    plan = variant.plan
    return {
        "runs": variant.runs,
        "trials": variant.trial_runs,
        "steps": variant.config.steps,
        "gpus": plan.gpus,
        "parameters": plan.step.parameters,
        "trained": plan.step.trained,
        "projectors": plan.step.projectors,
        "samples": plan.samples,
        "micro_batches": plan.micro_batches,
        "step_flops": plan.step_flops,
        "clip_flops": plan.clip_flops,
        "memory": {phase.name: memory_parts(phase) for phase in plan.phases},
        "peak": plan.peak.total,
        "peak_when": plan.peak.name,
        "clip_bytes": {"pixels": plan.clip.pixels, **plan.clip.cached},
        "checkpoint": {
            "one": plan.checkpoint.one,
            "optimizer": plan.checkpoint.optimizer,
            "training": plan.checkpoint.training,
            "finished": plan.checkpoint.finished,
        },
        "hours": variant.hours,
        "trial_hours": variant.trial_hours,
        "uncounted": sorted(plan.step.unknown),
    }


def _variants(plan: RecipePlan, memory: int) -> Table:
    rows = []
    for name, variant in plan.variants.items():
        one = variant.plan
        rows.append(
            [
                name,
                f"{one.step.trained:,} of {one.step.parameters + one.step.projectors:,}",
                f"{sum(one.step_flops.values()) / TERA:.3g}",
                gib(one.peak.total),
                one.peak.name,
                _yes(one.peak.total <= memory),
                _hours(variant),
            ]
        )
    counts = {f"{v.config.steps:,}" for v in plan.variants.values() if v.runs}
    title = f"{_sizes(plan)}, {', '.join(sorted(counts))} steps"
    header = ("run", "trained", "TF a step", "peak GiB", "when", "fits", "GPU-hours")
    return title, header, rows


def _sizes(plan: RecipePlan) -> str:
    """What is trained, as a title begins."""
    runs, count = plan.runs, len(plan.variants)
    match runs.kind:
        case "run":
            return runs.name
        case "stage1":
            return f"{runs.name}, Stage 1"
        case "sweep":
            return f"{runs.name}: {runs.num_trials} trials, {_seeds(runs.seeds)} each"
        case "comparison":
            return f"{runs.name}: {count} variants, {_seeds(runs.seeds)} each"


def _hours(variant: VariantPlan) -> str:
    if not variant.runs:
        return "memory alone"
    trials = f", a trial {number(variant.trial_hours)}" if variant.trial_runs else ""
    return f"{number(variant.hours)}{trials}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _operations(plan: RecipePlan) -> Table:
    variant = plan.highest
    flops, once = variant.plan.step_flops, variant.plan.clip_flops
    total = sum(flops.values())
    rows = [
        [part, f"{count / TERA:.3g}", f"{count / total:.1%}"]
        for part, count in sorted(flops.items(), key=lambda row: -row[1])
    ]
    rows += [[f"{part}, once a clip", f"{count / TERA:.3g}", ""] for part, count in once.items()]
    return "Operations of a step" + _of(plan), ("part", "TF", "share"), rows


def _memory(variant: VariantPlan) -> Table:
    rows = []
    for phase in variant.plan.phases:
        parts = [f"{part} {gib(size)}" for part, size in memory_parts(phase).items()]
        rows.append([phase.name, gib(phase.total), ", ".join(parts)])
    samples = variant.plan.samples
    each = f"{samples} sample{'s' if samples > 1 else ''} at a time"
    return f"Memory of a GPU, GiB, {each}", ("while", "peak", "of it"), rows


def _bytes(plan: RecipePlan) -> Table:
    highest, one = plan.highest, plan.highest.plan
    own = sum(one.clip.cached.values())
    keep = highest.config.checkpoint
    rows = [["a clip, decoded", size_text(one.clip.pixels), ""]]
    for encoding in plan.encodings:
        kept = [f"{part} {size_text(size)}" for part, size in encoding.kept.items() if size]
        size, clips = encoding.bytes_per_clip, encoding.clips
        rows.append(["a clip in the dataset cache, for all runs", size_text(size), ", ".join(kept)])
        rows.append(["all of them", size_text(size * clips), f"{clips:,} clips"])
    rows += [
        [
            f"read of it in a step{_of(plan).split(',')[0]}",
            size_text(highest.config.optim.batch_size * own),
            "",
        ],
        ["a checkpoint", size_text(one.checkpoint.one), _moments(one.checkpoint.optimizer)],
    ]
    if keep.asynchronous:
        where = "in main memory while a checkpoint is written"
        rows.append([where, size_text(one.checkpoint.one), "of all GPUs of a run together"])
    rows += [
        [
            "checkpoints of a run, while it trains",
            size_text(one.checkpoint.training),
            f"keep {keep.keep} and the one that is written",
        ],
        [
            "checkpoints of all finished runs",
            size_text(_checkpoints(plan)),
            f"keep_finished: {keep.keep_finished}",
        ],
    ]
    return "Bytes", ("what", "size", "of it"), rows


def _moments(size: int) -> str:
    return f"{size_text(size)} of it the optimizer's"


def _checkpoints(plan: RecipePlan) -> int:
    return sum(
        (variant.runs + variant.trial_runs) * variant.plan.checkpoint.finished
        for variant in plan.variants.values()
    )


def _of(plan: RecipePlan) -> str:
    if len(plan.variants) == 1:
        return ""
    highest = next(name for name, one in plan.variants.items() if one is plan.highest)
    return f" of {highest}, which needs the most memory"


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"
