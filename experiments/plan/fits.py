"""What to change, in which order, where a run does not fit into a GPU's memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from alignlab.config.model import LoraConfig
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.plan.comparison import plan_training
from alignlab.experiments.plan.recipe_runs import Training
from alignlab.plan.architecture import Architectures
from alignlab.plan.run_plan import RunPlan
from alignlab.stage1.config import Stage1Config

AnyTraining = TypeVar("AnyTraining", RunConfig, Stage1Config)
GPUS = (2, 4, 8, 16, 32, 64)


class Changed(Protocol):
    """Changes a config's settings."""

    def __call__(self, config: AnyTraining) -> AnyTraining: ...


@dataclass(frozen=True)
class Change:
    """A change of settings, made after those before it.

    Args:
        settings: as on the command line.
        peak: bytes of a GPU after it.
        fits: whether that is little enough.
    """

    settings: str
    peak: int
    fits: bool


def changes_to_fit(
    config: Training,
    plan: RunPlan,
    architectures: Architectures,
    memory: int,
) -> list[Change]:
    """Changes in the order in which they should be tried, until it fits; empty if it does already.

    First those that change no number, then those that cost time, then what is trained, last more
    GPUs: alone where the recipe is for several. What the run could not be trained with is left out.

    Args:
        config: of the run, or of a Stage 1 training.
        plan: of it.
        architectures: where settings of models are.
        memory: bytes of a GPU.
    """
    if isinstance(config, Stage1Config):
        found, *_ = _changed(config, plan, _stage1_candidates(config), architectures, memory)
        return found
    is_in_shards = config.model.shard != "none"
    if plan.peak.total > memory and is_in_shards and plan.gpus == 1:
        return gpus_in_shards(config, plan, architectures, memory)
    candidates = _candidates(config, plan.gpus)
    found, config, plan = _changed(config, plan, candidates, architectures, memory)
    if plan.peak.total > memory and not is_in_shards:
        found += gpus_in_shards(config, plan, architectures, memory)
    return found


def _changed(
    config: AnyTraining,
    plan: RunPlan,
    candidates: Iterator[tuple[str, Changed]],
    architectures: Architectures,
    memory: int,
) -> tuple[list[Change], AnyTraining, RunPlan]:
    """The candidates that help, in their order until it fits; the config and its plan with them."""
    found: list[Change] = []
    for settings, changed in candidates:
        if plan.peak.total <= memory:
            break
        tried = changed(config)
        after = _plan(tried, architectures, plan.gpus, plan)
        if after is not None and after.peak.total < plan.peak.total:
            config, plan = tried, after
            found.append(Change(settings, plan.peak.total, plan.peak.total <= memory))
    return found, config, plan


def gpus_in_shards(
    config: RunConfig, plan: RunPlan, architectures: Architectures, memory: int
) -> list[Change]:
    """The least number of GPUs on which a run fits in shards (FSDP2), with AdamW's own state.

    Each GPU has as many samples at a time as in the plan, where there are so many.

    Args:
        config: of the run.
        plan: of it.
        architectures: where settings of models are.
        memory: bytes of a GPU.

    Returns:
        One change; none where not even 64 GPUs are enough, or the batch has too few samples.
    """
    name, batch = config.optim.name, config.optim.batch_size
    plain = _set("optim", name="adamw")(config) if name == "adamw_8bit" else config
    for gpus in GPUS:
        count = max(1, batch // (gpus * plan.samples))
        if batch % (gpus * count):
            continue
        shared = _set("model", shard="fsdp2")(_set("optim", accumulate=count)(plain))
        after = _plan(shared, architectures, gpus, plan)
        if after is not None and after.peak.total <= memory:
            settings = "model.shard=fsdp2"
            if count != config.optim.accumulate:
                settings += f" optim.accumulate={count}"
            if plain is not config:
                settings += " optim.name=adamw"
            return [Change(f"{settings} on {gpus} GPUs", after.peak.total, True)]
    return []


def _plan(
    config: Training, architectures: Architectures, gpus: int, before: RunPlan
) -> RunPlan | None:
    """The plan of a changed run; None of one that is refused."""
    try:
        valid = type(config).model_validate(config.model_dump())
        return plan_training(valid, architectures, gpus=gpus, encoders=before.encoders)
    except (ValidationError, UserError):
        return None


def _candidates(config: RunConfig, gpus: int) -> Iterator[tuple[str, Changed]]:
    """Changes that apply to a run, by how they are written."""
    yield from _encoding_candidates(config)
    if config.eval.generates:
        yield _without_samples(config)
    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", _set("model", gradient_checkpointing=True)
    count = config.optim.batch_size // gpus
    if config.optim.accumulate < count and config.optim.batch_size % (count * gpus) == 0:
        yield f"optim.accumulate={count}", _set("optim", accumulate=count)
    if config.model.precision == "fp32":
        yield "model.precision=bf16", _set("model", precision="bf16")
    is_full = config.model.train == "full"
    if is_full and config.optim.name == "adamw" and config.model.shard == "none":
        yield "optim.name=adamw_8bit", _set("optim", name="adamw_8bit")
    if is_full and config.model.init == "trained":
        yield "model.train=lora", _set("model", train="lora", lora=LoraConfig())


def _encoding_candidates(config: Training) -> Iterator[tuple[str, Changed]]:
    """Those of the frozen models and of who runs them."""
    cache = config.data.cache
    if cache.mode == "off":
        yield (
            "data.cache.mode=write",
            _set("data", cache=cache.model_copy(update={"mode": "write"})),
        )
    elif not cache.texts or not cache.latents or not cache.teachers:
        on = {"texts": True, "latents": True, "teachers": True}
        text = "data.cache.texts=true data.cache.latents=true data.cache.teachers=true"
        yield text, _set("data", cache=cache.model_copy(update=on))
    model = config.text_model if isinstance(config, Stage1Config) else config.model
    if model is not None and model.text_encoder == "keep":
        yield "model.text_encoder=auto", _set("model", text_encoder="auto")
    if config.data.workers:
        yield "data.workers=0", _set("data", workers=0, prefetch=None)


def _without_samples(config: RunConfig) -> tuple[str, Changed]:
    """Nothing is decoded, and no generated clip measured."""
    off: dict[str, Any] = {"sample_clips": 0, "generated_clips": 0}
    settings = "eval.sample_clips=0 eval.generated_clips=0"
    if config.eval.metrics:
        off["metrics"] = ()
        settings += " eval.metrics=[]"
    if config.eval.sample_every is not None:
        off["sample_every"] = None
        settings += " eval.sample_every=null"
    return settings, _set("eval", **off)


def _stage1_candidates(config: Stage1Config) -> Iterator[tuple[str, Changed]]:
    """Changes that apply to a Stage 1 training."""
    yield from _encoding_candidates(config)
    if config.optim.batch_size > 1:
        yield "optim.batch_size=1", _set("optim", batch_size=1)


def _set(section: str, **values: Any) -> Changed:
    def changed(config: AnyTraining) -> AnyTraining:
        part = getattr(config, section).model_copy(update=values)
        return config.model_copy(update={section: part})

    return changed
