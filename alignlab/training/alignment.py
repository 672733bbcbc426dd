"""All alignment objectives of a run: teachers run once, every term weighted per sample.

Shape letters: B batch, K references, P tokens per frame, D width, T frames, H, W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alignlab.config.run import RunConfig
from alignlab.data.registry import DataConfig
from alignlab.data.sample import ClipDataset
from alignlab.dataset_cache.clip_keys import teacher_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.key import CacheKey, Part
from alignlab.distributed.ranks import Ranks
from alignlab.errors import UserError
from alignlab.losses import build_objective
from alignlab.losses.gate import gate_weights
from alignlab.losses.grids import describe
from alignlab.losses.objective import Features, Grid, Need, Objective, Terms
from alignlab.losses.schedule import Constant, PlateauWatch, StopAtPlateau, weight_at
from alignlab.models.frozen_parts import FrozenParts
from alignlab.models.taps import BlockTokens, Kind
from alignlab.models.weight_check import check_weights
from alignlab.progress import tell_once
from alignlab.randomness import derive_seed
from alignlab.runs.prolong import SchedulePlan
from alignlab.stage1.compatibility import check_stage1
from alignlab.teachers import DiffusionTeacher, Teacher, image_families, teacher_of_clips
from alignlab.training.aligned_samples import trained_samples, trains
from alignlab.training.batch_context import BatchContext
from alignlab.training.batches import Batch
from alignlab.training.encoded import FeatureRead, TokenKind
from alignlab.training.nonfinite import FEATURES
from alignlab.training.shuffle import check_shuffled
from alignlab.training.step_terms import SampleTerms

SAME_FEATURES = 1e-6  # of the largest value: rounding of fp32
WATCHED = "watched/"
"""Prefix of the log names of what plateau schedules watch."""


@dataclass(frozen=True)
class Aligned:
    """What the objectives add to a batch's loss.

    Args:
        loss_B: weighted, scheduled and gated sum over objectives.
        terms: unweighted terms by alias, for the log; without those that the schedule turned off.
        samples: by alias, which samples had something to align, bool (B,).
        weighted: what each objective adds to `loss_B`, by alias.
        counted: of `samples`, those in which the objective trains something
            (`alignlab.training.aligned_samples`).
        features: mean magnitude of the features of each teacher and kind of token, (B,), by log
            name.
    """

    loss_B: Tensor
    terms: dict[str, Terms]
    samples: dict[str, Tensor]
    weighted: dict[str, Tensor]
    counted: dict[str, Tensor]
    features: dict[str, Tensor]


class Alignment(nn.Module):
    """The objectives of a run (its trainable projectors) and the teachers they read.

    Args:
        config: the run; `objectives` and `teachers` are read.
        student_dim: width of the transformer's hidden tokens.
        grid: (T, H, W) of the video tokens.
        device: where projectors and teachers go.
        encoders: the run's, whose latents and texts diffusion teachers read; None: there are none.

    Raises:
        UserError: a teacher or a Stage 1 network cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        student_dim: int,
        grid: Grid,
        device: torch.device,
        encoders: FrozenParts | None = None,
    ) -> None:
        super().__init__()
        self.plan = SchedulePlan.of(config)
        self._logged: set[str] = set()
        self._grid_HW = grid[1:]
        is_cached = config.data.cache.mode != "off" and config.data.cache.teachers
        used = {name for o in config.objectives.values() for name in o.teachers}
        self.teachers: dict[str, Teacher | DiffusionTeacher] = {
            alias: teacher_of_clips(
                teacher, config.data, encoders, alias=alias, device=device, load=not is_cached
            )
            for alias, teacher in config.teachers.items()
            if alias in used
        }
        self.shuffled = {alias for alias in self.teachers if config.teachers[alias].shuffle}
        dims = {alias: teacher.dim for alias, teacher in self.teachers.items()}
        self.objectives: dict[str, Objective] = {}
        for alias, objective in config.objectives.items():
            check_stage1(config, alias, grid, self.teachers[objective.teachers[0]])
            try:
                built = build_objective(
                    objective,
                    student_dim=student_dim,
                    teacher_dims=dims,
                    seed=derive_seed(config.seed, f"projector-{alias}"),
                )
            except ValueError as error:  # such as a Stage 1 folder with damaged weights
                raise UserError(f"objectives.{alias}: {error}") from error
            frozen = ((n, p) for n, p in built.named_parameters() if not p.requires_grad)
            check_weights(f"objectives.{alias}: its Stage 1 network", frozen, fix="train it again")
            self.objectives[alias] = built
            # prefixed, because an alias may be the name of an attribute
            self.add_module(f"objective_{alias}", self.objectives[alias])
        self.to(device)
        self.watches: dict[str, PlateauWatch] = {}
        for alias, objective in config.objectives.items():
            if isinstance(objective.schedule, StopAtPlateau):
                # Metal has no float64
                where = "cpu" if device.type == "mps" else device
                self.watches[alias] = PlateauWatch(objective.schedule).to(where)
                self.add_module(f"stop_{alias}", self.watches[alias])

    @property
    def blocks(self) -> tuple[int, ...]:
        """Every block that an objective taps, ascending."""
        return tuple(sorted(self.kinds))

    @property
    def kinds(self) -> dict[int, set[Kind]]:
        """Which tokens of each of them an objective reads."""
        kinds: dict[int, set[Kind]] = {}
        for objective in self.objectives.values():
            for block in objective.config.blocks:
                kinds.setdefault(block, set()).add(objective.tokens)
        return kinds

    def check_data(self, clips: ClipDataset) -> None:
        """Refuses training clips that lack what an objective needs.

        Raises:
            UserError: an objective needs entity masks, and a clip has none; or it reads reference
                tokens, and no clip has a reference; or one clip alone has features to shuffle.
        """
        key = clips.without_masks()
        for alias, objective in self.objectives.items():
            reads_references = objective.tokens == "reference" and trains(objective.config)
            if reads_references and not clips.share_with_references():
                raise UserError(
                    f"objectives.{alias}: aligns reference tokens, and no training clip has a "
                    "reference; list images under `references` in the data set's metadata "
                    "(docs/data.md), or remove the objective"
                )
            if key is not None and "masks" in objective.needs:
                raise UserError(
                    f"objectives.{alias}: needs entity masks, and {key} has none; add `masks` and "
                    "`entities` to the data set's metadata (docs/data.md)"
                )
            for name in self.shuffled.intersection(objective.config.teachers):
                check_shuffled(name, clips, references=objective.tokens == "reference")

    def check_teachers(self, config: RunConfig, grid: Grid, values: EncodedValues) -> None:
        """Refuses teachers whose features say nothing, by those of two different clips of noise.

        Args:
            config: the run.
            grid: (T, H, W) of its video tokens.
            values: where these features are kept as well: a teacher is not loaded to be checked.

        Raises:
            UserError: features are not finite, or those of the two clips are the same.
        """
        for alias, teacher in self.teachers.items():
            where = f"teachers.{alias}: {config.teachers[alias].path}, feature {teacher.feature}"
            read = FeatureRead(teacher, "video", teacher.grid or grid[1:])
            check_noise(where, read, config.data, values)

    def check_world_size(self, world_size: int) -> None:
        """Refuses several ranks where an objective couples the samples of a batch.

        Raises:
            UserError: each rank would see its own share only.
        """
        for alias, objective in self.objectives.items():
            if objective.couples_samples and world_size > 1:
                raise UserError(
                    f"objectives.{alias}: it compares the samples of a batch, which {world_size} "
                    "ranks would share among them: use one process (or, for refalign, "
                    "negatives: sample)"
                )

    def factors(self, step: int) -> dict[str, float]:
        """What the schedule of each objective that has one makes of its weight at a step."""
        return {
            alias: weight_at(
                objective.config.schedule,
                step,
                self.plan.total_steps(step),
                stopped=alias in self.watches and self.watches[alias].stopped,
            )
            for alias, objective in self.objectives.items()
            if not isinstance(objective.config.schedule, Constant)
        }

    def reads(self, step: int) -> list[FeatureRead]:
        """What `forward` reads of teachers at a step."""
        factors, found = self.factors(step), dict[FeatureRead, None]()
        for alias, objective in self.objectives.items():
            for name in objective.config.teachers if factors.get(alias, 1.0) else ():
                teacher, kind = self.teachers[name], objective.tokens
                own_HW = teacher.grid if kind == "video" else None
                read = FeatureRead(teacher, kind, own_HW or self._grid_HW, name in self.shuffled)
                found[read] = None
        return list(found)

    def needs(self, step: int) -> frozenset[Need]:
        """What else of the clips the objectives need at a step."""
        factors = self.factors(step)
        used = [o.needs for alias, o in self.objectives.items() if factors.get(alias, 1.0)]
        return frozenset[Need]().union(*used)

    def forward(self, taps: Mapping[int, BlockTokens], batch: Batch, step: int) -> Aligned:
        """Runs each teacher once and each objective on its tapped tokens.

        An objective whose schedule gives 0 is left out, and so is a teacher that only it reads.
        """
        features: dict[tuple[str, str], Features] = {}
        loss_B = torch.zeros_like(batch.sigma_B)
        terms: dict[str, Terms] = {}
        samples: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        counted: dict[str, Tensor] = {}
        factors = self.factors(step)
        known = BatchContext(batch, self._reference_grid(taps))
        for alias, objective in self.objectives.items():
            factor = factors.get(alias, 1.0)
            if factor == 0:
                continue
            config, kind = objective.config, objective.tokens
            grid = taps[config.blocks[0]].of(kind).grid
            for name in config.teachers:
                if (name, kind) not in features:
                    features[name, kind] = teacher_features(
                        self.teachers[name], batch, kind, grid, is_shuffled=name in self.shuffled
                    )
            student = {b: taps[b].of(kind) for b in config.blocks}
            if kind == "reference":
                student = {
                    b: replace(tokens, subject_ids_BN=known.ids_BN, host_ids_BN=known.host_ids_BN)
                    for b, tokens in student.items()
                }
            self._log_grids(alias, grid, [features[name, kind].grid for name in config.teachers])
            teacher = {name: features[name, kind] for name in config.teachers}
            try:
                objective_terms = objective(student, teacher, known.of(objective))
            except ValueError as error:  # such as grids that do not correspond
                raise UserError(f"objectives.{alias}: {error}") from error
            gate_B = gate_weights(config.gate, batch.sigma_B)
            weighted[alias] = config.weight * factor * gate_B * objective_terms.loss_B
            loss_B = loss_B + weighted[alias]
            terms[alias] = objective_terms
            has_tokens_B = known.has_video_B if kind == "video" else known.has_references_B
            aligned_B = objective_terms.aligned_B
            samples[alias] = has_tokens_B if aligned_B is None else aligned_B
            shown_B = samples[alias]
            if kind == "reference":
                shown_B = shown_B & known.shows_reference_B
            counted[alias] = trained_samples(gate_B, objective_terms.loss_B, shown_B)
        return Aligned(loss_B, terms, samples, weighted, counted, feature_magnitudes(features))

    def watch(self, step: int, terms: SampleTerms, ranks: Ranks) -> None:
        """Shows plateau schedules what they watch in a step: its mean over the samples of all ranks
        that had something to align."""
        watches = {f"{WATCHED}{alias}": watch for alias, watch in self.watches.items()}
        names = [name for name in watches if name in terms]
        if not names:
            return
        sums, counts = ranks.total(terms.sums(names))
        means = sums / counts.clamp_min(1)
        for name, mean, count in zip(names, means, counts, strict=True):
            watches[name].see(step, mean, count > 0)

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
        tell_once(
            f"{alias}: {objective.config.name} on {objective.tokens} tokens of block "
            f"{_depths(objective.config.blocks)}; {grids}"
        )


def check_noise(where: str, read: FeatureRead, data: DataConfig, values: EncodedValues) -> None:
    """`check_features` of a teacher's features of `noise_clips`, which are kept like any others."""
    frames = data.frames if read.teacher.is_video else 1

    def make() -> dict[str, Tensor]:
        if isinstance(read.teacher, DiffusionTeacher):
            features = read.teacher.encode(*noise_latents(read.teacher))
        else:
            features = read.teacher.encode(noise_clips(frames, data.size), read.grid_HW)
        tokens_BTPD = features.tokens_BTPD
        check_features(where, tokens_BTPD)
        return {"tokens_BTPD": tokens_BTPD}

    def refusal() -> str:
        return _not_finite(where)

    def key() -> CacheKey:
        return noise_key(read, data)

    check_features(where, values.get("teacher", key, make, refusal)["tokens_BTPD"])


def noise_key(read: FeatureRead, data: DataConfig) -> CacheKey:
    """Names a teacher's features of `noise_clips` in the dataset cache."""
    frames = data.frames if read.teacher.is_video else 1
    noise: dict[str, Part] = {"of": "noise", "frames": frames, "size": tuple(data.size)}
    return teacher_key(noise, read.teacher.parts, read.grid_HW)


def _not_finite(where: str) -> str:
    return f"{where}: gives features that are not finite; take other weights"


def noise_clips(frames: int, size_HW: tuple[int, int]) -> Tensor:
    """A dark and a bright clip of noise, uint8 (2, T, H, W, 3)."""
    generator = torch.Generator().manual_seed(0)
    dark, bright = (
        torch.randint(low, low + 128, (frames, *size_HW, 3), generator=generator, dtype=torch.uint8)
        for low in (0, 128)
    )
    return torch.stack([dark, bright])


def noise_latents(teacher: DiffusionTeacher) -> tuple[Tensor, Tensor]:
    """Two latents of noise, (2, C, T, H, W), and texts of one token of zeros, (2, 1, D)."""
    generator = torch.Generator().manual_seed(0)
    latents_BCTHW = torch.randn(2, *teacher.latent_shape, generator=generator)
    return latents_BCTHW, torch.zeros(2, 1, teacher.text_dim)


def check_features(where: str, tokens_BTPD: Tensor) -> None:
    """Refuses features of two clips that are not finite, or are the same.

    Raises:
        UserError: begins with `where`.
    """
    if not tokens_BTPD.isfinite().all():
        raise UserError(_not_finite(where))
    dark, bright = tokens_BTPD
    if float((dark - bright).abs().max()) <= SAME_FEATURES * float(tokens_BTPD.abs().max()):
        raise UserError(
            f"{where}: gives the same features whatever it sees, so there is nothing to align "
            "with; take other weights or another feature"
        )


def feature_magnitudes(features: Mapping[tuple[str, str], Features]) -> dict[str, Tensor]:
    """Mean magnitude of a sample's features, (B,): not finite if one of them is not.

    Tokens of zeros are left out: they fill up samples with fewer references than others.
    """
    means = {}
    for (alias, kind), found in features.items():
        x_BTPD = found.tokens_BTPD
        # a norm, which keeps no copy of the features in fp32
        sums_BTP = torch.linalg.vector_norm(x_BTPD, ord=1, dim=-1, dtype=torch.float32)
        count_B = (sums_BTP != 0).flatten(1).sum(1).clamp_min(1) * x_BTPD.shape[-1]
        means[f"{FEATURES}{alias}/{kind}"] = sums_BTP.flatten(1).sum(1) / count_B
    return means


def _depths(blocks: tuple[int, ...]) -> str:
    return ", ".join(f"{block} (depth {block + 1})" for block in blocks)


def teacher_features(
    teacher: Teacher | DiffusionTeacher,
    batch: Batch,
    kind: TokenKind,
    grid: Grid,
    *,
    is_shuffled: bool = False,
) -> Features:
    """A teacher's features of the batch's frames (`video`) or reference images (`reference`).

    The teacher's patch grid is the student's, unless it has its own for video; along time it sees
    every pixel frame. Each clip is encoded by itself (`Encoded.features`), or read from the dataset
    cache; references are padded with zeros to `(B, K, P, D)`.

    Args:
        teacher: of either kind.
        batch: the clips.
        kind: of tokens.
        grid: (T, H, W) of the student's tokens.
        is_shuffled: take other clips' features (`alignlab.training.shuffle`).

    Raises:
        UserError: reference images for a video teacher.
    """
    if kind == "video":
        read = FeatureRead(teacher, "video", teacher.grid or grid[1:], is_shuffled)
        tokens_BTPD = torch.stack([rows for rows in batch.features(read) if rows is not None])
        return Features(tokens_BTPD, (tokens_BTPD.shape[1], *read.grid_HW))
    if teacher.is_video:
        raise UserError(
            "teachers: a video teacher takes whole clips, and references are images: give "
            f"objectives on reference tokens an image teacher ({image_families()})"
        )
    shape = (len(batch.clips), grid[0], grid[1] * grid[2], teacher.dim)
    padded = torch.zeros(shape, device=batch.sigma_B.device)
    read = FeatureRead(teacher, "reference", grid[1:], is_shuffled)
    for row, rows in enumerate(batch.features(read)):
        if rows is not None:
            padded[row, : len(rows)] = rows
    return Features(padded, grid)
