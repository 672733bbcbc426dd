"""Everything that a run trains with, built once from its recipe."""

import hashlib
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig, check_blocks
from alignlab.data.registry import build_splits, dataset_files
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.distributed.ranks import Ranks, mixed_precision, single_rank
from alignlab.distributed.sharding import is_in_shards, shard_transformer, weight_norm
from alignlab.errors import UserError
from alignlab.evaluation.own_metrics import described, try_metrics
from alignlab.evaluation.token_metrics import MIN_TOKENS
from alignlab.kernels.plugins import ImplementationError
from alignlab.losses.grids import Grid
from alignlab.losses.objective import check_implementations
from alignlab.models.compiled_blocks import check_compiler
from alignlab.models.experts import WHOLE, Window, noise_window
from alignlab.models.frozen_parts import FrozenParts
from alignlab.models.other_expert import folder_with_other
from alignlab.models.pipeline_parts import COMPONENTS
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.text_encoder import cut_captions
from alignlab.models.wan import Wan, load_wan
from alignlab.progress import warn_once
from alignlab.recipe import dump, recipe_hash
from alignlab.runs.file_digests import sizes_digest
from alignlab.teachers import DiffusionTeacher, teacher_from
from alignlab.training.aligned_samples import gate_notes
from alignlab.training.alignment import Alignment
from alignlab.training.batches import ClipEncoder
from alignlab.training.build_optimizer import build_optimizer, check_optimizer
from alignlab.training.checkpoint import RunState
from alignlab.training.clip_memory import ClipMemory, MadeOnce
from alignlab.training.encoded import Encoded, FeatureRead
from alignlab.training.flow_matching import FlowWeights
from alignlab.training.optim import fp32_copy
from alignlab.training.run_alignment import check_data, check_teachers, run_alignment
from alignlab.training.self_teacher import SelfTeacher
from alignlab.training.shuffle import shuffle_note
from alignlab.training.teacher_check import check_noise

Value = TypeVar("Value")
Args = ParamSpec("Args")

MADE_AHEAD: Any = {"data": {"workers", "prefetch"}}
"""Settings, as pydantic excludes them, that change neither what is encoded nor where it is kept."""
TRIED_CLIPS = 2  # by metrics of other packages, before the first step


@dataclass
class Run:
    """Everything that a run trains with, built once from its recipe."""

    config: RunConfig
    ranks: Ranks
    wan: Wan
    alignment: Alignment
    state: RunState
    clips: ClipEncoder
    val_clips: ClipEncoder
    flow_weights: FlowWeights
    branch: ReferenceBranch
    caches: "Caches"
    notes: tuple[str, ...]
    """Warnings about data and teachers, which were logged; they are kept in `result.json`."""
    self_teacher: SelfTeacher | None = None
    window: Window = WHOLE
    """Noise levels that are drawn and validated."""

    @property
    def device(self) -> torch.device:
        """Where this rank trains."""
        return self.ranks.device

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's mixed precision."""
        if self.state.is_in_shards:  # a cache would keep each block whole, in bf16
            return mixed_precision(self.device, self.config.model.precision, cache=False)
        return self.ranks.autocast()

    def meet(self) -> None:
        """Waits for the others before forward passes of a model in shards, however long it takes.

        Within a pass they wait as long as the device's collectives do, which give up after minutes:
        rank 0 may load a teacher or decode a clip meanwhile.
        """
        if self.state.is_in_shards:
            self.ranks.barrier()

    def with_model(
        self, work: Callable[Args, Value], *args: Args.args, **settings: Args.kwargs
    ) -> Value:
        """What `work`, which calls the transformer, gives: on rank 0, for all ranks.

        Of a transformer in shards, on all of them, each of which gives its own: every forward pass
        needs them all.
        """
        if self.state.is_in_shards:
            return work(*args, **settings)
        return self.ranks.on_main(work, *args, **settings)

    def own_metrics(self) -> dict[str, Any]:
        """What a result says of metrics of other packages; empty where none is measured."""
        named = described(self.config.eval.metrics)
        return {"own_metrics": named} if named else {}


@dataclass
class Caches:
    """What runs on the same data share: encoded clips, and what is measured of the real ones.

    Args:
        values: what encoders and teachers made of clips, on disk.
        train: clips of the train split.
        val: clips of the val split.
        frozen: the encoders, as far as they are loaded.
        real_metrics: metrics of real clips by teacher, number of clips and metrics of other
            packages (`alignlab.evaluation.generation`).
        val_samples: by teacher, what metrics of generated clips need of each val clip and its
            references (`alignlab.evaluation.generation_metrics`).
    """

    values: EncodedValues
    train: ClipMemory[Encoded] = field(default_factory=ClipMemory)
    val: ClipMemory[Encoded] = field(default_factory=ClipMemory)
    frozen: FrozenParts | None = None
    real_metrics: dict[tuple[str | None, int, tuple[str, ...]], dict[str, float]] = field(
        default_factory=dict
    )
    val_samples: dict[str | None, ClipMemory[MadeOnce]] = field(default_factory=dict)


def build_run(config: RunConfig, caches: Caches | None = None, ranks: Ranks | None = None) -> Run:
    """Loads the models and data of a recipe; projectors are built before the optimizer.

    Args:
        config: the recipe.
        caches: encoded clips of earlier runs; None: none yet.
        ranks: this rank and those that train with it; None: it is alone.

    Raises:
        UserError: the recipe cannot run here, or this process is one of several and no process
            group was joined.
    """
    ranks = ranks or single_rank(config.model.precision)
    _check_device(config, ranks.device)
    if ranks.world_size > 1:
        ranks.on_main(_check_data, config)  # the others find what it found, if they share `output`
    dataset, val_dataset = build_splits(config.data, memory=user_path(config.output))
    caches = caches or new_caches(config)
    wan = _load_wan(config, caches, ranks)
    caches.frozen = wan.frozen
    check_blocks(config, wan.num_blocks)
    grid = wan.latent_grid(config.data.frames, *config.data.size)
    _check_grid(config, grid, wan)
    alignment = run_alignment(config, wan, grid, ranks.device)
    check_data(alignment, dataset)
    alignment.check_world_size(ranks.world_size)
    captions = [clips.caption(i) for clips in (dataset, val_dataset) for i in range(len(clips))]
    told = (
        *cut_captions(wan.text, captions),
        *_teacher_notes(config, alignment),
        *gate_notes(config),
    )
    for note in told:
        warn_once(note)
    window = noise_window(config.model)
    self_teacher, branch = hooked(config, wan, alignment, window)
    return Run(
        config,
        ranks,
        wan,
        alignment,
        initial_state(config, wan, alignment, self_teacher),
        ClipEncoder(wan.frozen, dataset, caches.values, caches.train),
        ClipEncoder(wan.frozen, val_dataset, caches.values, caches.val),
        FlowWeights(config.flow),
        branch,
        caches,
        (*dataset.notes, *val_dataset.notes, *told),
        self_teacher,
        window,
    )


def hooked(
    config: RunConfig, wan: Wan, alignment: Alignment, window: Window
) -> tuple[SelfTeacher | None, ReferenceBranch]:
    """What reads the transformer's blocks while it runs, for objectives and for itself."""
    self_teacher = SelfTeacher.of(config.objectives, wan.transformer, window.ends[0])
    branch = ReferenceBranch.of(
        wan.transformer,
        config.model,
        taps=alignment.taps,
        kinds=alignment.kinds,
        others=() if self_teacher is None else (self_teacher.taps,),
    )
    return self_teacher, branch


def _check_device(config: RunConfig, device: torch.device) -> None:
    """Refuses, before anything is loaded, settings that its device does not bear."""
    check_optimizer(config.optim, device)
    if config.model.compile == "blocks":
        check_compiler(device)


def _load_wan(config: RunConfig, caches: Caches, ranks: Ranks) -> Wan:
    in_shards = is_in_shards(config.model, ranks)
    wan = load_wan(
        config.model.path,
        expert=config.model.expert,
        train=config.model.train,
        lora=config.model.lora,
        attention=config.model.attention,
        gradient_checkpointing=config.model.gradient_checkpointing,
        compiled=config.model.compile == "blocks",
        precision=config.model.precision,
        weights=config.model.weights,
        device=ranks.device,
        transformer_device="cpu" if in_shards else None,
        seed=config.seed,
        init=config.model.init,
        text_encoder=config.model.text_encoder,
        parks_vae=caches.values.keeps("video"),
        frozen=caches.frozen,
        load_frozen=config.data.cache.mode == "off",
        clip=(config.data.frames, *config.data.size),
    )
    if in_shards:
        shard_transformer(wan.transformer, ranks, replicas=config.model.replicate)
    return wan


def _check_data(config: RunConfig) -> None:
    build_splits(config.data, memory=user_path(config.output))


def _teacher_notes(config: RunConfig, alignment: Alignment) -> list[str]:
    """What has to be said of the teachers, whatever the numbers are."""
    notes = [shuffle_note(alias) for alias in sorted(alignment.shuffled)]
    if config.teachers and config.measured_against is None:
        notes.append(
            "no teacher of the recipe reads frames and gives hidden tokens: tokens and generated "
            "clips are measured against none; name one, such as teachers.dino={family: tiny-dino}"
        )
    if config.objectives and not config.teachers:
        notes.append(_no_teacher_note(config))
    return notes


def _no_teacher_note(config: RunConfig) -> str:
    from alignlab.evaluation.measured_names import lacking_a_teacher  # which evaluates runs

    tokens, clips = lacking_a_teacher(config)
    of_clips = f", nor, of generated clips, {', '.join(clips)}"
    return (
        f"the recipe has no teacher: {', '.join(tokens)} of blocks are not measured"
        f"{of_clips if clips and config.eval.num_measured_clips else ''}; to have them, name one "
        "that no objective needs to read, such as teachers.dino={family: tiny-dino}"
    )


def _check_grid(config: RunConfig, grid: Grid, wan: Wan) -> None:
    """Refuses clips that the transformer has no positions for, and too few tokens to measure.

    Raises:
        UserError: one line.
    """
    frames, height, width = grid
    positions = wan.transformer.rope.max_seq_len
    _, most = config.data.references
    if config.model.absent_references == "zero":
        most = max(most, 1)  # a frame of zeros stands in for references
    for setting, length in {
        "data.frames and data.references": frames + most,
        "data.size": max(height, width),
    }.items():
        if length > positions:
            raise UserError(
                f"{setting}: {length} positions, this transformer has {positions} (along time, "
                "references included, and along each side)"
            )
    tokens = config.eval.clips * frames * height * width
    if config.teachers and tokens < MIN_TOKENS:
        raise UserError(
            f"eval.clips: {config.eval.clips} of {tokens} tokens in all are too few to measure: "
            f"at least {MIN_TOKENS}"
        )


def initial_state(
    config: RunConfig, wan: Wan, alignment: Alignment, self_teacher: SelfTeacher | None
) -> RunState:
    """Optimizer and averages of a run that has taken no step."""
    parameters = [*wan.transformer.parameters(), *alignment.parameters()]
    ema = None
    if config.optim.ema is not None:
        named = wan.transformer.named_parameters()
        ema = {name: fp32_copy(p) for name, p in named if p.requires_grad}
    own = None if self_teacher is None else self_teacher.average
    optimizer = build_optimizer(parameters, config.optim)
    return RunState(optimizer, wan.transformer, alignment, ema, self_teacher=own)


def check_teachers_and_eval(run: Run) -> None:
    """Looks, before the first step, at what would show only during or after the training.

    What diffusion teachers are centred by is made, by rank 0 for all. Teachers that objectives read
    must tell two clips apart, and the one that is only measured against must have sound weights:
    rank 0, which evaluates, alone reads it. Warns of an evaluation on fewer clips than asked for.
    Kernels of other packages must be there, and the expert that is not trained, which probing and
    evaluating a run do without; metrics of other packages are tried on real clips.

    Raises:
        UserError: a teacher is of no use, a kernel that an objective names cannot run here, the
            other expert's files are missing, or a metric cannot be measured.
    """
    config = run.config
    for name, objective in config.objectives.items():
        try:
            check_implementations(objective)
        except ImplementationError as error:
            raise UserError(f"objectives.{name}: {error}") from error
    if config.model.expert is not None and config.eval.generates:
        run.ranks.on_main(_check_other_expert, config)
    run.ranks.on_main(try_own_metrics, run)
    grid = run.wan.latent_grid(config.data.frames, *config.data.size)
    check_teachers(run.alignment, config, grid, run.caches.values)
    for teacher in run.alignment.teachers.values():
        if isinstance(teacher, DiffusionTeacher) and teacher.is_centred:
            read = FeatureRead(teacher, "video", teacher.grid)
            run.clips.keep_centre(read, run.ranks.on_main(run.clips.centre_of, read))
    alias = config.measured_against
    if alias is not None and alias not in run.alignment.teachers:
        run.ranks.on_main(_check_measured_teacher, run, alias)
    warn_of_few_clips(run)


def _check_other_expert(config: RunConfig) -> None:
    # gives nothing: what rank 0 finds would be sent to the others
    folder_with_other(config.model)


def warn_of_few_clips(run: Run) -> None:
    """Warns of an evaluation on fewer clips than asked for."""
    for key in ("clips", "sample_clips", "generated_clips"):
        count = getattr(run.config.eval, key) or 0
        if count > len(run.val_clips):
            warn_once(
                f"eval.{key}: {count}, but the val split has {len(run.val_clips)}; those are taken"
            )


def _check_measured_teacher(run: Run, alias: str) -> None:
    # gives nothing: what rank 0 finds would be sent to the others
    config, is_kept = run.config, run.caches.values.keeps("teacher")
    device = run.device if is_kept else "cpu"
    teacher = teacher_from(config.teachers[alias], device=device, load=not is_kept)
    if is_kept:
        grid = run.wan.latent_grid(config.data.frames, *config.data.size)
        read = FeatureRead(teacher, "video", teacher.grid or grid[1:])
        check_noise(f"teachers.{alias}", read, config.data, run.caches.values)


@torch.no_grad()
def try_own_metrics(run: Run) -> None:
    """Measures a few real clips by metrics of other packages: what fails is told early.

    Raises:
        UserError: a package is missing, or a metric fails or gives no finite number.
    """
    config = run.config
    if not config.eval.metrics:
        return
    count = min(TRIED_CLIPS, config.eval.num_measured_clips, len(run.val_clips))
    samples = [run.val_clips.sample(i) for i in range(count)]
    try_metrics(config.eval.metrics, samples, fps=config.data.fps, device=run.device)


def check_ranks_agree(run: Run) -> None:
    """Compares all settings, clips, files of frozen models and norms of all other weights.

    Of clips, their number and the names and sizes of their files.

    Raises:
        UserError: the ranks differ.
    """
    ranks = run.ranks
    if ranks.world_size == 1:
        return
    ranks.check_same("the recipe", recipe_hash(run.config))
    # what changes no number decides as well when all ranks meet, such as `eval.every`
    ranks.check_same("a setting", hashlib.sha256(dump(run.config).encode()).hexdigest()[:12])
    ranks.check_same("the number of clips", (len(run.clips), len(run.val_clips)))
    read = dataset_files(run.config.data)
    if read is not None:
        ranks.check_same("the files of the clips", sizes_digest(read.files)[:12])
    for alias, teacher in run.alignment.teachers.items():
        weights = str(teacher.parts["weights"])[:12]
        ranks.check_same(f"the weights of the teacher {alias}", weights)
    frozen = run.wan.frozen
    for name, parts in (("autoencoder", frozen.vae_parts), ("text encoder", frozen.text.parts)):
        digests = {part: str(parts[part])[:12] for part in COMPONENTS if part in parts}
        ranks.check_same(f"the files of the {name}", digests)
    networks: dict[str, nn.Module] = {"the objectives": run.alignment}
    if not run.state.is_in_shards:  # else `shard_transformer` compared them while they were whole
        networks = {"the transformer": run.wan.transformer, **networks}
    for name, network in networks.items():
        ranks.check_same(f"the weights of {name}", float(weight_norm(network)))


def shared_caches(config: RunConfig, caches: dict[str, Caches]) -> Caches:
    """Those of earlier runs whose clips are encoded as this run's are.

    That is the same data through the same encoders in the same precision. Where there are none,
    new ones are put into `caches`.
    """
    key = encoding_settings(config)
    if key not in caches:
        caches[key] = new_caches(config)
    return caches[key]


def encoding_settings(config: RunConfig) -> str:
    """Settings that are equal where runs encode alike and keep it in one place."""
    model = {"path", "precision", "text_encoder"}
    include: dict[str, Any] = {"model": model, "data": True, "output": True}
    return config.model_dump_json(include=include, exclude=MADE_AHEAD)


def new_caches(config: RunConfig) -> Caches:
    """Empty ones, for runs that encode as this one does."""
    values = EncodedValues.of(config.data.cache, config.output)
    weakref.finalize(values, values.cache.flush)  # whatever command asked for them
    return Caches(values)
