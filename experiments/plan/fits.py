"""What to change, in which order, where a run does not fit into a GPU's memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from alignlab.config.model import LoraConfig
from alignlab.config.run import RunConfig
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_step import fake_step
from alignlab.plan.run_plan import RunPlan, plan_run
from alignlab.plan.sizes import phases, sharded

GIB = 2**30
CARDS = (2, 4, 8, 16, 32, 64)


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
    config: RunConfig,
    plan: RunPlan,
    architectures: Architectures,
    memory: int,
) -> list[Change]:
    """Changes in the order in which they should be tried, until it fits; empty if it does already.

    First those that change no number, then those that cost time, then what is trained.

    Args:
        config: of the run.
        plan: of it.
        architectures: where settings of models are.
        memory: bytes of a GPU.
    """
    found: list[Change] = []
    for settings, changed in _candidates(config, plan.gpus):
        if plan.peak.total <= memory:
            break
        config = changed(config)
        after = plan_run(config, architectures, gpus=plan.gpus, encoders=plan.encoders)
        if after.peak.total < plan.peak.total:
            plan = after
            found.append(Change(settings, plan.peak.total, plan.peak.total <= memory))
    if plan.peak.total > memory and config.model.shard == "none":
        cards = cards_when_sharded(config, plan, architectures, memory)
        if cards is not None:
            found.append(Change(f"model.shard=fsdp2 on {cards[0]} GPUs", cards[1], True))
    return found


def cards_when_sharded(
    config: RunConfig, plan: RunPlan, architectures: Architectures, memory: int
) -> tuple[int, int] | None:
    """GPUs that a run needs if its weights, gradients and moments are sharded over them (FSDP2).

    Arithmetic, not a measurement: what is sharded is divided, two blocks are whole at a time. Each
    GPU has as many samples at a time as in the plan.

    Args:
        config: of the run, which does not shard.
        plan: of it.
        architectures: where settings of models are.
        memory: bytes of a GPU.

    Returns:
        Their number and the bytes that each then holds; None: not even 64 are enough.
    """
    step = fake_step(config, architectures, samples=plan.samples, in_shards=True)
    found = phases(config, plan.encoders, step, 1)
    whole = plan.micro_batches > 1
    for cards in CARDS:
        shards = (sharded(phase, plan.blocks, cards, whole_gradients=whole) for phase in found)
        peak = max(phase.total for phase in shards)
        if peak <= memory:
            return cards, peak
    return None


Changed = Callable[[RunConfig], RunConfig]


def _candidates(config: RunConfig, gpus: int) -> Iterator[tuple[str, Changed]]:
    """Changes that apply to a run, by how they are written."""
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
    if config.model.text_encoder == "keep":
        yield "model.text_encoder=auto", _set("model", text_encoder="auto")
    if config.data.workers:
        yield "data.workers=0", _set("data", workers=0, prefetch=None)
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


def _set(section: str, **values: Any) -> Changed:
    def changed(config: RunConfig) -> RunConfig:
        part = getattr(config, section).model_copy(update=values)
        return config.model_copy(update={section: part})

    return changed
