"""Everything that a run trains with, built once from its recipe."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from alignlab.config.run import RunConfig, check_blocks
from alignlab.data.registry import build_dataset
from alignlab.distributed.ranks import Processes, one_process
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.wan import Wan, load_wan
from alignlab.training.alignment import Alignment
from alignlab.training.batches import ClipEncoder, EncodedCache
from alignlab.training.checkpoint import TrainState
from alignlab.training.flow_matching import FlowWeights


@dataclass
class Run:
    """Everything that a run trains with, built once from its recipe."""

    config: RunConfig
    processes: Processes
    wan: Wan
    alignment: Alignment
    state: TrainState
    clips: ClipEncoder
    val_clips: ClipEncoder
    flow_weights: FlowWeights
    branch: ReferenceBranch
    caches: "Caches"

    @property
    def accelerator(self) -> Accelerator:
        """The device of this process and its mixed precision."""
        return self.processes.accelerator


@dataclass
class Caches:
    """What the runs of a comparison share: encoded clips, and what is measured of the real ones.

    Args:
        train: clips of the train split.
        val: clips of the val split.
        judged: metrics of real clips by teacher and number of clips
            (`alignlab.evaluation.generation`).
    """

    train: EncodedCache
    val: EncodedCache
    judged: dict[tuple[str | None, int], dict[str, float]] = field(default_factory=dict)


def build_run(
    config: RunConfig,
    caches: Caches | None = None,
    processes: Processes | None = None,
) -> Run:
    """Loads the models and data of a recipe; projectors are built before the optimizer.

    Args:
        config: the recipe.
        caches: encoded clips of earlier runs; None: none yet.
        processes: this process and those that train with it; None: it is alone.

    Raises:
        UserError: the recipe cannot run here, or this process is not alone and nothing joins it.
    """
    processes = processes or one_process(config.model.precision)
    accelerator = processes.accelerator
    dataset, val_dataset = build_dataset(config.data, "train"), build_dataset(config.data, "val")
    wan = load_wan(
        config.model.path,
        train=config.model.train,
        lora=config.model.lora,
        attention=config.model.attention,
        gradient_checkpointing=config.model.gradient_checkpointing,
        precision=config.model.precision,
        device=accelerator.device,
        seed=config.seed,
    )
    check_blocks(config, wan.num_blocks)
    grid = wan.latent_grid(config.data.frames, *config.data.size)
    alignment = Alignment(config, student_dim=wan.student_dim, grid=grid, device=accelerator.device)
    alignment.check_data(dataset)
    alignment.check_processes(processes.count)
    state = _initial_state(config, wan, alignment)
    caches = caches or new_caches(config)
    branch = ReferenceBranch(
        wan.transformer,
        text_to_references=config.model.text_to_references,
        blocks=alignment.blocks,
    )
    return Run(
        config,
        processes,
        wan,
        alignment,
        state,
        ClipEncoder(wan, dataset, caches.train),
        ClipEncoder(wan, val_dataset, caches.val),
        FlowWeights(config.flow),
        branch,
        caches,
    )


def _initial_state(config: RunConfig, wan: Wan, alignment: Alignment) -> TrainState:
    trained = [*wan.transformer.parameters(), *alignment.parameters()]
    optimizer = torch.optim.AdamW(
        [p for p in trained if p.requires_grad],
        lr=config.optim.lr,
        betas=config.optim.betas,
        weight_decay=config.optim.weight_decay,
    )
    ema = None
    if config.optim.ema is not None:
        named = wan.transformer.named_parameters()
        ema = {name: p.detach().clone() for name, p in named if p.requires_grad}
    return TrainState(wan.transformer, alignment, optimizer, ema)


def shared_caches(config: RunConfig, known: dict[str, Caches]) -> Caches:
    """Those of the runs in `known` whose clips are encoded as this run's are.

    That is the same data through the same encoders in the same precision. Where there are none,
    new ones are put into `known`.
    """
    key = config.model_dump_json(include={"model": {"path", "precision"}, "data": True})
    return known.setdefault(key, new_caches(config))


def new_caches(config: RunConfig) -> Caches:
    """Empty caches of the size that the recipe allows."""
    return Caches(EncodedCache(config.data.cache_clips), EncodedCache(config.data.cache_clips))
