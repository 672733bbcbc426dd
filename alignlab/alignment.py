"""All alignment objectives of a run: teachers run once, every term weighted per sample.

Shape letters: B batch, K references, P tokens per frame, D width, T frames, H, W pixels.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alignlab.conditioning import Batch
from alignlab.config import RunConfig
from alignlab.errors import UserError
from alignlab.losses import build_objective
from alignlab.losses.gate import gate_weights
from alignlab.losses.grids import describe
from alignlab.losses.objective import Context, Features, Grid, Objective, Terms, Tokens
from alignlab.losses.schedule import weight_at
from alignlab.randomness import derive_seed
from alignlab.taps import BlockTokens
from alignlab.teachers import Teacher, load_teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Aligned:
    """What the objectives add to a batch's loss.

    Args:
        loss_B: weighted, scheduled and gated sum over objectives.
        terms: unweighted terms by alias, for the log.
        rows: by alias, the samples that had tokens to align (references may be dropped).
    """

    loss_B: Tensor
    terms: dict[str, Terms]
    rows: dict[str, list[int]]


class Alignment(nn.Module):
    """The objectives of a run (its trainable projectors) and the teachers they read.

    Args:
        config: the run; `objectives` and `teachers` are read.
        student_dim: width of the transformer's hidden tokens.
        device: where projectors and teachers go.
    """

    def __init__(self, config: RunConfig, *, student_dim: int, device: torch.device) -> None:
        super().__init__()
        self._steps = config.steps
        self._told: set[str] = set()
        used = {name for o in config.objectives.values() for name in o.teachers}
        self.teachers: dict[str, Teacher] = {
            alias: load_teacher(row.family, path=row.path, feature=row.feature, device=device)
            for alias, row in config.teachers.items()
            if alias in used
        }
        dims = {alias: teacher.dim for alias, teacher in self.teachers.items()}
        self.objectives: dict[str, Objective] = {}
        for alias, objective in config.objectives.items():
            self.objectives[alias] = build_objective(
                objective,
                student_dim=student_dim,
                teacher_dims=dims,
                seed=derive_seed(config.seed, f"projector-{alias}"),
            )
            # prefixed, because an alias may be the name of an attribute
            self.add_module(f"objective_{alias}", self.objectives[alias])
        self.to(device)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Every block that an objective taps, ascending."""
        return tuple(sorted({b for o in self.objectives.values() for b in o.config.blocks}))

    def forward(self, taps: Mapping[int, BlockTokens], batch: Batch, step: int) -> Aligned:
        """Runs each teacher once and each objective on its tapped tokens."""
        features: dict[tuple[str, str], Features] = {}
        loss_B = torch.zeros_like(batch.sigma_B)
        terms: dict[str, Terms] = {}
        rows: dict[str, list[int]] = {}
        for alias, objective in self.objectives.items():
            config, kind = objective.config, objective.tokens
            grid = _grid(taps[config.blocks[0]], kind)
            for name in config.teachers:
                if (name, kind) not in features:
                    features[name, kind] = teacher_features(self.teachers[name], batch, kind, grid)
            student = {
                b: taps[b].video if kind == "video" else shared_subjects(taps[b], batch.names)
                for b in config.blocks
            }
            self._tell(alias, grid, [features[name, kind].grid for name in config.teachers])
            chosen = {name: features[name, kind] for name in config.teachers}
            found = objective(student, chosen, context_of(batch, alias, objective))
            scale = config.weight * weight_at(config.schedule, step, self._steps)
            loss_B = loss_B + scale * gate_weights(config.gate, batch.sigma_B) * found.loss_B
            terms[alias] = found
            rows[alias] = [i for i, r in enumerate(batch.references) if kind == "video" or len(r)]
        return Aligned(loss_B, terms, rows)

    def _tell(self, alias: str, student: Grid, teachers: list[Grid]) -> None:
        """Says once per objective which blocks and which token grids meet."""
        if alias in self._told or not student[0]:
            return
        self._told.add(alias)
        objective = self.objectives[alias]
        log.info(
            "%s: %s on %s tokens of block %s; %s",
            alias,
            objective.config.name,
            objective.tokens,
            _depths(objective.config.blocks),
            ", ".join(describe(student, teacher) for teacher in teachers),
        )


def context_of(batch: Batch, alias: str, objective: Objective) -> Context:
    """What the objective needs to know of the batch's clips.

    Raises:
        UserError: it needs entity masks and a clip has none.
    """
    masks_BTHW = None
    if "masks" in objective.needs:
        masks = [mask for mask in batch.masks if mask is not None]
        if len(masks) < len(batch.masks):
            raise UserError(
                f"objectives.{alias}: needs entity masks, and a clip of this data set has none; "
                "add `masks` to its metadata (docs/data.md)"
            )
        masks_BTHW = torch.stack(masks)
    return Context(batch.caption_BLD if "text" in objective.needs else None, masks_BTHW)


def shared_subjects(tokens: BlockTokens, names: list[list[str]]) -> Tokens:
    """Reference tokens with one subject id for all references of a sample with the same name.

    A tap numbers references by their slot; two pictures of one subject must not be pushed apart.
    """
    ids_BN = tokens.reference.subject_ids_BN
    assert ids_BN is not None  # reference tokens always carry ids
    if all(len(set(row)) == len(row) for row in names):
        return tokens.reference
    ids_BN = ids_BN.clone()
    for row, sample in enumerate(names):
        for slot, name in enumerate(sample):
            ids_BN[row][ids_BN[row] == slot] = sample.index(name)
    return replace(tokens.reference, subject_ids_BN=ids_BN)


def _depths(blocks: tuple[int, ...]) -> str:
    return ", ".join(f"{block} (depth {block + 1})" for block in blocks)


def teacher_features(teacher: Teacher, batch: Batch, kind: str, grid: Grid) -> Features:
    """A teacher's features of the batch's frames (`video`) or reference images (`reference`).

    The teacher's patch grid is the student's; along time it sees every pixel frame. Reference
    images of all samples go through in one call and are padded with zeros to `(B, K, P, D)`.
    """
    if kind == "video":
        return teacher.encode(batch.video_BTHWC, grid[1:])
    counts = [len(images) for images in batch.reference_images]
    padded = torch.zeros(
        len(counts), grid[0], grid[1] * grid[2], teacher.dim, device=batch.sigma_B.device
    )
    if sum(counts):
        flat = teacher.encode(torch.cat(batch.reference_images)[None], grid[1:]).tokens_BTPD[0]
        for row, rows in enumerate(flat.split(counts)):
            padded[row, : len(rows)] = rows
    return Features(padded, grid)


def _grid(tokens: BlockTokens, kind: str) -> Grid:
    return tokens.video.grid if kind == "video" else tokens.reference.grid
