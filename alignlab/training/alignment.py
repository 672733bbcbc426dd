"""The alignment objectives of a training, attached to its transformer.

`alignlab.attach` makes an `Alignment` for any training loop (docs/own-loop.md), a run of alignlab
makes its own from its recipe (`alignlab.training.run_alignment`). Both have their losses here:
teachers run once a batch, every term is weighted per sample.
Shape letters: B batch, K references, P tokens per frame, D width, T frames, H, W pixels.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alignlab.config.run import check_coupled
from alignlab.errors import UserError
from alignlab.losses import build_objective
from alignlab.losses.attention_config import AttentionConfig
from alignlab.losses.grids import describe
from alignlab.losses.objective import (
    LATENTS,
    Features,
    Grid,
    Need,
    Objective,
    ObjectiveConfig,
    Reads,
    Terms,
    Tokens,
)
from alignlab.models.taps import BlockTokens, Kind, Taps, find_wan
from alignlab.models.weight_check import check_weights
from alignlab.progress import tell_once
from alignlab.randomness import derive_seed
from alignlab.teachers import DiffusionTeacher, Teacher
from alignlab.training.aligned_samples import AlignedInOwnLoop, trained_samples, trains
from alignlab.training.batch_context import BatchContext, ClipContents
from alignlab.training.encoded import FeatureRead
from alignlab.training.gradient_share import Outputs, gradient_squares
from alignlab.training.objective_weights import ObjectiveWeights
from alignlab.training.own_clips import Clips, GivenClips, Place, RecordedTokens
from alignlab.training.step_terms import Aligned, SampleTerms, feature_magnitudes
from alignlab.training.teacher_features import teacher_features


class Alignment(nn.Module):
    """Objectives on a Wan transformer: their projectors, the teachers they read, the taps.

    Its parameters are the projectors, to be trained with the transformer; those of a frozen Stage 1
    network want no gradient. Its state dict is all that a training must keep of it. `attach` (or a
    `with` block) puts hooks on the transformer, `detach` takes them away.

    In a loop of one's own, run the transformer inside `recording` and call the object, `forward`,
    once for each of those forward passes. A run of alignlab calls `losses` with the tokens that its
    `ReferenceBranch` has cut out.

    Args:
        transformer: a diffusers Wan transformer, as it is or wrapped.
        objectives: validated settings by alias.
        teachers: by alias; those that an objective names are kept.
        seed: of the projectors' initial weights; the same for every rank.
        total_steps: for how many steps schedules take the training, as of a step; None: unknown.
        device: of the projectors.
        grid: (T, H, W) of the video's tokens, if all batches have the same.
        shuffled: teachers whose features come shuffled (`alignlab.training.shuffle`).
        references: where the sequence of an own loop holds reference frames; None: nowhere.

    Attributes:
        objectives: by alias; each holds its `config`.
        teachers: by alias.
        weights: how much each counts in a step.
        taps: the hooks.

    Raises:
        UserError: an objective cannot be built, or taps a block that there is not.
    """

    def __init__(
        self,
        transformer: nn.Module,
        objectives: Mapping[str, ObjectiveConfig],
        teachers: Mapping[str, Teacher | DiffusionTeacher],
        *,
        seed: int,
        total_steps: Callable[[int], int | None],
        device: torch.device,
        grid: Grid | None = None,
        shuffled: Collection[str] = (),
        references: Place | None = None,
    ) -> None:
        super().__init__()
        model = find_wan(transformer)
        self._grid = grid
        self._logged: set[str] = set()
        used = {name for config in objectives.values() for name in config.teachers}
        self.teachers = {alias: row for alias, row in teachers.items() if alias in used}
        self.shuffled = frozenset(shuffled).intersection(used)
        width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
        _, *patch = model.config["patch_size"]
        self._patch_HW = (int(patch[0]), int(patch[1]))
        latents_dim = model.config["out_channels"] * math.prod(patch)
        dims = {alias: teacher.dim for alias, teacher in self.teachers.items()}
        self.objectives: dict[str, Objective] = {}
        for alias, config in objectives.items():
            self.objectives[alias] = _built(alias, config, width, dims, latents_dim, seed)
            # prefixed, because an alias may be the name of an attribute
            self.add_module(f"objective_{alias}", self.objectives[alias])
        self.to(device)
        self.weights = ObjectiveWeights(objectives, total_steps, device)
        for alias, watch in self.weights.watches.items():
            self.add_module(f"stop_{alias}", watch)
        for alias, measured in self.weights.measured.items():
            self.add_module(f"weight_{alias}", measured)
        self.taps = Taps(
            model, self.blocks, [block for block, of in self.kinds.items() if "attention" in of]
        )
        self._recorded = RecordedTokens(model, self.taps, references)
        self._seen = AlignedInOwnLoop([a for a, c in objectives.items() if trains(c)])
        self._last: int | None = None  # step of the last call that step_done was not told of
        self._checks: list[Callable[[GivenClips, Grid], bool]] = []

    # In a loop of one's own

    def attach(self) -> Self:
        """Puts the hooks on the transformer, where they are not there yet; gives itself."""
        if not self.taps.is_attached:
            self.taps.__enter__()
        return self

    def detach(self) -> None:
        """Takes the hooks away: the transformer is as it was. Projectors and state stay.

        Warns of an objective that has aligned nothing in all steps so far.
        """
        self.taps.__exit__(None, None, None)
        self._recorded.forget()
        self._seen.warn()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the transformer's forward pass: the tapped blocks' tokens are kept for `forward`.

        Several forward passes inside one `recording` hold the batch's samples one after the other,
        such as samples with different numbers of references. A new `recording` forgets the last
        one. Run no other forward pass inside, such as a validation or guidance.

        Raises:
            UserError: the object is detached.
        """
        with self._recorded.recording():
            yield

    def forward(self, clips: Clips, step: int) -> Aligned:
        """The loss terms of the forward passes of the last `recording`.

        Args:
            clips: what the samples show, in the order in which they went through the transformer.
            step: optimizer steps done, which schedules read. Micro-batches of a step have its
                number in common.

        Returns:
            `.loss`, to be added to the flow loss, and what it is made of. Under `torch.no_grad`
            it is a validation, which no plateau sees and no count of aligned samples.

        Raises:
            UserError: nothing was recorded, or `clips` do not go with it or lack what an objective
                reads; or an objective cannot align anything.
        """
        if not _is_count(step):
            raise UserError(f"step: {step!r} is no number of optimizer steps, counted from 0")
        if not isinstance(clips, Clips):
            raise UserError(f"clips: expected alignlab.Clips, got {type(clips).__name__}")
        if self.weights.watches and self._last not in (None, step):
            raise UserError(
                f"step {self._last} was not shown to stop_at_plateau: call "
                "alignment.step_done(step, aligned, ...) after each optimizer step"
            )
        given, on = GivenClips(clips, self.teachers), self.weights.active(step)
        for alias in on:
            given.check(alias, self.objectives[alias])
        taps, grid = self._recorded.take(clips, {self.objectives[a].tokens for a in on}, self.kinds)
        self._checks = [check for check in self._checks if not check(given, grid)]
        for alias in on if torch.is_grad_enabled() else ():
            self._refuse_no_gradient(alias, taps)
        aligned = self.losses(given, step, taps)
        if torch.is_grad_enabled():  # else it is a validation
            self._seen.see(aligned)
            self._last = step
        return aligned

    def step_done(self, step: int, *aligned: Aligned) -> None:
        """Shows `stop_at_plateau` schedules what they watch; other schedules need no call.

        Call it after each optimizer step, on all ranks of a process group.

        Args:
            step: the number that `forward` was given.
            aligned: what it gave for each micro-batch of the step, on this rank.

        Raises:
            UserError: it is another step than the last or was shown already, or it is without what
                `forward` gave.
        """
        if not _is_count(step) or step != self._last or not aligned:
            raise UserError(
                f"step_done: {step!r} with {len(aligned)} results; give the step that alignment "
                "was called with last, once, and what it gave for each of its micro-batches"
            )
        terms = SampleTerms.joined([part.sample_terms() for part in aligned])
        self.weights.watch(step, terms, _sum_over_ranks)
        self._last = None

    def add_check(self, check: Callable[[GivenClips, Grid], bool]) -> None:
        """Has a look at the first batches of an own loop, until it says that it has seen enough.

        Args:
            check: is given clips and the grid of the video's tokens; raises a UserError.
        """
        self._checks.append(check)

    def _refuse_no_gradient(self, alias: str, taps: Mapping[int, BlockTokens]) -> None:
        config, kind = self.objectives[alias].config, _tapped(self.objectives[alias])
        for block in config.blocks:  # a deeper block that it taps may be what it is compared with
            if trains(config) and not taps[block].of(kind).tokens_BND.requires_grad:
                raise UserError(
                    f"objectives.{alias}: the tokens of block {block} carry no gradient, so it "
                    "would train its projector alone: run the transformer without no_grad, and "
                    f"train weights in block {block} or before it"
                )

    # In every loop

    @property
    def blocks(self) -> tuple[int, ...]:
        """Every block that an objective taps, ascending."""
        return tuple(sorted(self.kinds))

    @property
    def kinds(self) -> dict[int, set[Kind]]:
        """What of each of them an objective reads."""
        kinds: dict[int, set[Kind]] = {}
        for objective in self.objectives.values():
            for block in objective.config.tapped_blocks:
                kinds.setdefault(block, set()).add(_tapped(objective))
        return kinds

    def check_world_size(self, world_size: int) -> None:
        """Refuses several ranks where an objective couples the samples of a batch.

        Raises:
            UserError: each rank would see its own share only.
        """
        check_coupled(self.objectives, world_size)

    def reads(self, step: int) -> list[FeatureRead]:
        """What `losses` reads of teachers at a step, where all batches have the same grid."""
        assert self._grid is not None  # of every run
        return self.reads_on(self._grid, self.weights.active(step))

    def reads_on(self, grid: Grid, aliases: Collection[str]) -> list[FeatureRead]:
        """What some objectives read of teachers.

        Args:
            grid: (T, H, W) of the video's tokens.
            aliases: of the objectives.
        """
        found: list[FeatureRead] = []
        for alias in aliases:
            kind = self.objectives[alias].tokens
            for name in self.objectives[alias].config.teachers:
                teacher = self.teachers[name]
                own_HW = teacher.grid if kind == "video" else None
                read = FeatureRead(teacher, kind, own_HW or grid[1:], name in self.shuffled)
                if read not in found:
                    found.append(read)
        return found

    def needs(self, step: int) -> frozenset[Need]:
        """What else of the clips the objectives need at a step."""
        used = [self.objectives[alias].needs for alias in self.weights.active(step)]
        return frozenset[Need]().union(*used)

    def is_on(self, step: int, reads: Reads) -> bool:
        """Whether a step computes an objective that reads this."""
        return any(self.objectives[alias].reads == reads for alias in self.weights.active(step))

    def losses(
        self,
        clips: ClipContents,
        step: int,
        taps: Mapping[int, BlockTokens],
        own: Mapping[str, Features] | None = None,
    ) -> Aligned:
        """Runs each teacher once and each objective on its tapped tokens, but for one whose
        schedule gives 0 and a teacher that only it reads.

        Args:
            clips: what the samples show.
            step: optimizer steps done.
            taps: by block, the tokens that the objectives read.
            own: features of the student's average, where one reads them.

        Raises:
            UserError: grids do not correspond, or a teacher or a kernel cannot be used.
        """
        features: dict[tuple[str, str], Features] = {}
        loss_B = torch.zeros_like(clips.sigma_B)
        terms: dict[str, Terms] = {}
        samples: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        counted: dict[str, Tensor] = {}
        measured: dict[str, Tensor] = {}
        factors = self.weights.factors(step)
        known = BatchContext(clips, self._reference_grid(taps), self._patch_HW)
        for alias, objective in self.objectives.items():
            factor = factors.get(alias, 1.0)
            if factor == 0:
                continue
            config, kind = objective.config, objective.tokens
            grid = taps[config.blocks[0]].of(_tapped(objective)).grid
            for name in config.teachers:
                if (name, kind) not in features:
                    features[name, kind] = teacher_features(
                        self.teachers[name], clips, kind, grid, is_shuffled=name in self.shuffled
                    )
            student = _student(objective, taps, known)
            teacher = {name: features[name, kind] for name in config.teachers}
            teacher |= _untaught(objective, known, own)
            self._log_grids(alias, grid, [features.grid for features in teacher.values()])
            try:
                objective_terms = objective(student, teacher, known.of(objective))
            except ValueError as error:  # such as grids that do not correspond
                raise UserError(f"objectives.{alias}: {error}") from error
            gate_B = self.weights.gate(alias, clips.sigma_B, clips.step_sigma_S)
            weight = self.weights.weight(alias)
            weighted[alias] = weight * factor * gate_B * objective_terms.loss_B
            if self.weights.is_measured(alias):
                measured[alias] = gate_B * objective_terms.loss_B
            loss_B = loss_B + weighted[alias]
            terms[alias] = objective_terms
            samples[alias], shown_B = _aligned_samples(objective, objective_terms, known)
            counted[alias] = trained_samples(gate_B, objective_terms.loss_B, shown_B)
        magnitudes, watched = feature_magnitudes(features), frozenset(self.weights.watches)
        return Aligned(loss_B, terms, samples, weighted, counted, magnitudes, watched, measured)

    def gradient_squares(
        self, flow_B: Tensor, aligned: Aligned, outputs: Outputs
    ) -> dict[str, Tensor]:
        """What `alignlab.training.gradient_share` finds of the objectives whose weight is measured.

        Args:
            flow_B: the flow loss as it enters the step.
            aligned: what `losses` gave.
            outputs: of the tapped blocks.
        """
        blocks = {alias: row.config.blocks for alias, row in self.objectives.items()}
        return gradient_squares(flow_B, aligned.measured, blocks, outputs)

    def _reference_grid(self, taps: Mapping[int, BlockTokens]) -> Grid | None:
        """That of the reference tokens, the same in every block; None: nothing reads them."""
        kept = (taps[block].kept_reference for block in self.kinds)
        return next((tokens.grid for tokens in kept if tokens is not None), None)

    def _log_grids(self, alias: str, student: Grid, teachers: list[Grid]) -> None:
        """Logs once per objective which blocks and which token grids meet."""
        if alias in self._logged or not student[0]:
            return
        self._logged.add(alias)
        objective = self.objectives[alias]
        grids = ", ".join(describe(student, teacher, objective.side) for teacher in teachers)
        where = " and ".join(_depths(blocks) for blocks in objective.config.taps.values())
        deep = " and ".join(map(_depths, objective.config.self_taps.values()))
        against = {"teacher": grids, "latents": f"clean latents, {grids}", "nothing": "no teacher"}
        against["self"] = f"block {deep} of its average, {grids}"
        what = (
            "attention maps" if _tapped(objective) == "attention" else f"{objective.tokens} tokens"
        )
        tell_once(
            f"{alias}: {objective.config.name} on {what} of block "
            f"{where}; {against[objective.reads]}"
        )


def _aligned_samples(
    objective: Objective, terms: Terms, known: BatchContext
) -> tuple[Tensor, Tensor]:
    """Which samples had something to align, and in which of them a picture is shown, bool (B,)."""
    is_video = objective.tokens == "video"
    aligned_B = known.has_video_B if is_video else known.has_references_B
    if terms.aligned_B is not None:
        aligned_B = terms.aligned_B
    return aligned_B, aligned_B if is_video else aligned_B & known.shows_reference_B


def _student(
    objective: Objective, taps: Mapping[int, BlockTokens], known: BatchContext
) -> dict[int, Tokens]:
    """The student's tokens that an objective reads, by block."""
    student = {b: taps[b].of(_tapped(objective)) for b in objective.config.tapped_blocks}
    if objective.tokens == "video":
        return student
    return {
        b: replace(tokens, subject_ids_BN=known.ids_BN, host_ids_BN=known.host_ids_BN)
        for b, tokens in student.items()
    }


def _tapped(objective: Objective) -> Kind:
    """What of a block an objective reads."""
    return "attention" if isinstance(objective.config, AttentionConfig) else objective.tokens


def _untaught(
    objective: Objective, known: BatchContext, own: Mapping[str, Features] | None
) -> dict[str, Features]:
    """What an objective reads in the place of a teacher's features."""
    if objective.reads == "latents":
        return {LATENTS: known.latents}
    if objective.reads == "self":
        assert own is not None  # `RunTrainer.forward`; a loop of one's own has none
        return dict(own)
    return {}


def _built(
    alias: str,
    config: ObjectiveConfig,
    width: int,
    dims: Mapping[str, int],
    latents_dim: int,
    seed: int,
) -> Objective:
    try:
        built = build_objective(
            config,
            student_dim=width,
            teacher_dims=dims,
            latents_dim=latents_dim,
            seed=derive_seed(seed, f"projector-{alias}"),
        )
    except ValueError as error:  # such as a Stage 1 folder with damaged weights
        raise UserError(f"objectives.{alias}: {error}") from error
    frozen = ((n, p) for n, p in built.named_parameters() if not p.requires_grad)
    check_weights(f"objectives.{alias}: its Stage 1 network", frozen, fix="train it again")
    return built


def _is_count(step: object) -> bool:
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0


def _sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def _depths(blocks: tuple[int, ...]) -> str:
    return ", ".join(f"{block} (depth {block + 1})" for block in blocks)
