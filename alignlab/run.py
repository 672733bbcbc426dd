"""Everything that a run trains with, built once from its recipe."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from alignlab.alignment import Alignment
from alignlab.checkpoint import TrainState
from alignlab.conditioning import ClipEncoder, EncodedCache
from alignlab.config import RunConfig, check_blocks
from alignlab.data.registry import build_dataset
from alignlab.errors import UserError
from alignlab.flow import FlowWeights
from alignlab.reference_branch import ReferenceBranch
from alignlab.wan import Wan, load_wan


@dataclass
class Run:
    """Everything that a run trains with, built once from its recipe."""

    config: RunConfig
    accelerator: Accelerator
    wan: Wan
    alignment: Alignment
    state: TrainState
    clips: ClipEncoder
    val_clips: ClipEncoder
    flow_weights: FlowWeights
    branch: ReferenceBranch


@dataclass
class Caches:
    """Encoded clips that the runs of a comparison share."""

    train: EncodedCache
    val: EncodedCache


def build_run(config: RunConfig, caches: Caches | None = None) -> Run:
    """Loads the models and data of a recipe; projectors are built before the optimizer."""
    accelerator = one_process(config.model.precision)
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
    state = _initial_state(config, wan, alignment)
    caches = caches or new_caches(config)
    branch = ReferenceBranch(
        wan.transformer,
        text_to_references=config.model.text_to_references,
        blocks=alignment.blocks,
    )
    return Run(
        config,
        accelerator,
        wan,
        alignment,
        state,
        ClipEncoder(wan, dataset, caches.train),
        ClipEncoder(wan, val_dataset, caches.val),
        FlowWeights(config.flow),
        branch,
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


def new_caches(config: RunConfig) -> Caches:
    """Empty caches of the size that the recipe allows."""
    return Caches(EncodedCache(config.data.cache_clips), EncodedCache(config.data.cache_clips))


def one_process(precision: str) -> Accelerator:
    """The device of this process, and its mixed precision.

    Raises:
        UserError: the run was started as several processes.
    """
    # accelerate keeps the first precision of a process; runs of a comparison may differ in it.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
    if accelerator.num_processes > 1:
        raise UserError(
            f"started as {accelerator.num_processes} processes: a run uses one process for now; "
            "start it without accelerate or torchrun"
        )
    return accelerator
