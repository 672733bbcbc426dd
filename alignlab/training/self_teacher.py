"""The student's own moving average as a teacher, which sees each sample at a cleaner noise level.

SRA, Self-Flow and their like (`SelfTeacherConfig`): besides the student's forward pass there is one
of the average in every step, without gradients, with the same noise, captions and references. The
average is apart from `optim.ema`, is in checkpoints and in no export.
Shape letters: B batch, C channels, T, H, W of latents, N video tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from alignlab.losses.objective import (
    Features,
    ObjectiveConfig,
    SelfTeacherConfig,
    TwoLevelConfig,
    self_key,
)
from alignlab.models.reference_branch import OtherWeights, ReferenceBranch
from alignlab.models.taps import Kind, Taps, WanTransformer
from alignlab.training.aligned_samples import trains
from alignlab.training.batches import Batch
from alignlab.training.flow_matching import interpolate
from alignlab.training.optim import fp32_copy, move_average
from alignlab.training.two_levels import TwoLevels


class SelfTeacher:
    """What a run keeps for the one objective that has the student's average for a teacher.

    Args:
        alias: of the objective.
        config: its settings.
        transformer: the student.
        cleanest: noise level below which the average, which is of one expert, sees none.

    Attributes:
        average: the trained parameters' moving average by name, at first their own values; it is
            also the run state's, which saves and restores it.
        taps: on the deep blocks, to be among the `others` of the run's branch.
    """

    def __init__(
        self,
        alias: str,
        config: SelfTeacherConfig,
        transformer: WanTransformer,
        cleanest: float = 0.0,
    ) -> None:
        self.alias, self.config = alias, config
        self._cleanest = cleanest
        self.taps = Taps(transformer, config.deep_blocks)
        _, *patch = transformer.config["patch_size"]
        self._patch_HW = (int(patch[0]), int(patch[1]))
        self.average: dict[str, Tensor] = {
            name: fp32_copy(p) for name, p in transformer.named_parameters() if p.requires_grad
        }

    @classmethod
    def of(
        cls,
        objectives: dict[str, ObjectiveConfig],
        transformer: WanTransformer,
        cleanest: float = 0.0,
    ) -> "SelfTeacher | None":
        """That of a run's objectives, of which at most one has one."""
        for alias, config in objectives.items():
            if isinstance(config, SelfTeacherConfig):
                return cls(alias, config, transformer, cleanest)
        return None

    @property
    def draws(self) -> dict[str, Any]:
        """What `training_batch` is to draw for it, by the name of its argument."""
        if isinstance(self.config, TwoLevelConfig):
            return {"levels": TwoLevels(self.config.mask_ratio, self._patch_HW)}
        return {"cleaner": self.config.cleaner}

    @torch.no_grad()
    def features(self, branch: ReferenceBranch, batch: Batch) -> dict[str, Features]:
        """The average's tokens of the deep blocks, on the student's grid.

        Args:
            branch: of the run, entered.
            batch: with what `draws` names.
        """
        if batch.second is not None:
            sigma_B = batch.second.cleaner(batch.sigma_B)
        else:
            assert batch.cleaner_B is not None  # of every batch of such a run
            sigma_B = (batch.sigma_B - batch.cleaner_B).clamp_min(self._cleanest)
        blocks = self.config.deep_blocks
        kinds: dict[int, tuple[Kind, ...]] = {block: ("video",) for block in blocks}
        tapped = branch(
            interpolate(batch.latents_BCTHW, batch.noise_BCTHW, sigma_B),
            sigma_B * 1000,
            batch.text_BLD,
            batch.references,
            other=OtherWeights(self.average, self.taps, kinds),
        ).taps
        tokens = {block: tapped[block].video for block in blocks}
        return {
            self_key(block): Features(x.tokens_BND.unflatten(1, (x.grid[0], -1)), x.grid)
            for block, x in tokens.items()
        }

    def update(self, transformer: nn.Module, step: int) -> None:
        """Moves the average after a step, 0-based."""
        move_average(self.average, transformer, self.config.decay_at(step))


def student_input(batch: Batch, teacher: SelfTeacher | None) -> tuple[Tensor, Tensor | None]:
    """Noisy latents, and the timesteps of their tokens where these are not all a sample's.

    Args:
        batch: of the run.
        teacher: that the step reads, if any; with weight 0 it changes no input.

    Returns:
        (B, C, T, H, W) and, where samples hold two noise levels, (B, N) of video tokens: else a
        timestep for each sample says the same and needs less memory.
    """
    if teacher is None or batch.second is None or not trains(teacher.config):
        return interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B), None
    return batch.second.mixed(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B)
