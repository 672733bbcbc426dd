"""What to change, in which order, where a run does not fit into a GPU's memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from alignlab.config.model import LoraConfig
from alignlab.config.run import RunConfig
from alignlab.plan.architecture import Architectures
from alignlab.plan.run_plan import RunPlan, plan_run
from alignlab.plan.sizes import sharded

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
        found += _sharded(plan, memory)
    return found


def cards_when_sharded(plan: RunPlan, blocks: int, memory: int) -> int | None:
    """GPUs that a run needs if its weights, gradients and moments are sharded over them (FSDP2).

    Arithmetic, not a measurement: what is sharded is divided, two blocks are whole at a time.

    Args:
        plan: of the run.
        blocks: of the transformer.
        memory: bytes of a GPU.

    Returns:
        None: not even 64 are enough.
    """
    if plan.is_sharded:
        return plan.gpus if plan.peak.total <= memory else None
    return next((n for n in (1, *CARDS) if _on_cards(plan, blocks, n) <= memory), None)


def _on_cards(plan: RunPlan, blocks: int, cards: int) -> int:
    whole = plan.micro_batches > 1
    found = [sharded(phase, blocks, cards, whole_gradients=whole) for phase in plan.phases]
    return max(phase.total for phase in found)


def _sharded(plan: RunPlan, memory: int) -> Iterator[Change]:
    # blocks hold all but a few percent of the weights
    cards = cards_when_sharded(plan, plan.blocks, memory)
    if cards is not None and cards > 1:
        settings = f"model.shard=fsdp2 on {cards} GPUs"
        yield Change(settings, _on_cards(plan, plan.blocks, cards), True)


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
