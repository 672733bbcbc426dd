"""SARA (arXiv 2605.07800): token relations, counted where the text says that something is.

Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width, L text tokens.
"""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, final

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from alignlab.kernels.cosine import accumulation_dtype, unit
from alignlab.kernels.relation import (
    DENOMINATOR_EPS,
    OPERATION,
    Impl,
    Relation,
    Routing,
    mean_relation,
    pair_weight,
    relation_distance,
)
from alignlab.losses.grids import FOREGROUND, Grid, pool_masks, student_on, teacher_on
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Need,
    Objective,
    ObjectiveConfig,
    Side,
    Terms,
    Tokens,
    implementation_of,
)
from alignlab.losses.projector import REPA_HIDDEN, project, repa_projector
from alignlab.losses.search_space import NumberRange, SearchRange
from alignlab.losses.stage1.folder import load_for_teacher
from alignlab.losses.stage1.saliency_aligner import SaliencyAligner
from alignlab.losses.weight import Weight


def routed_relation_loss(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    *,
    routing: Routing = "or",
    tau: float = math.inf,
    temporal_weight: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Computes `spatial + temporal_weight * temporal` for each sample, (B,), >= 0.

    Both are saliency-weighted means of `|cos among student - cos among teacher|`, over pairs of
    tokens of one frame and of different frames. No gradient reaches teacher or saliency.

    Args:
        student_BTPD: student tokens; their width need not be the teacher's.
        teacher_BTPD: teacher tokens at the same places.
        saliency_BTP: in [0, 1], how much a token shows what the text names.
        routing: how the saliencies of two tokens become the weight of the pair: "or" (paper),
            "and", "xor", or "uniform", which reads no saliency (VideoREPA without margin).
        tau: decay over frames of the temporal weights; infinity, so none, in the paper.
        temporal_weight: 1.0 (paper).
        impl: see `alignlab.kernels.relation.relation_distance`.

    Raises:
        ValueError: shapes do not fit, a setting has no meaning, or `impl` cannot run.
    """
    relation = relation_distance(
        student_BTPD,
        teacher_BTPD.detach(),
        saliency_BTP=saliency_BTP.detach(),
        routing=routing,
        tau=tau,
        impl=impl,
    )
    return relation.spatial + temporal_weight * relation.temporal


def decided_relation(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    undecided_BTP: Tensor,
    *,
    routing: Routing,
    tau: float,
    impl: str,
) -> Relation:
    """Computes `relation_distance` over the pairs of tokens that are both decided.

    A sample without undecided tokens gets the very values of `relation_distance`.

    Args:
        student_BTPD: student tokens.
        teacher_BTPD: teacher tokens at the same places.
        saliency_BTP: in [0, 1]; not read where a token is undecided.
        undecided_BTP: bool, tokens that are in no pair.
        routing: any but "uniform".
        tau: decay over frames.
        impl: see `alignlab.kernels.relation.relation_distance`.
    """
    # two tokens of zeros are at a distance of 0 from all others on both sides: what is left of
    # pairs with an undecided token is their weight, in the denominators alone
    student_BTPD, teacher_BTPD = (
        x_BTPD.masked_fill(undecided_BTP[..., None], 0.0) for x_BTPD in (student_BTPD, teacher_BTPD)
    )
    saliency_BTP = saliency_BTP.masked_fill(undecided_BTP, 0.0)
    relation = relation_distance(
        student_BTPD, teacher_BTPD, saliency_BTP=saliency_BTP, routing=routing, tau=tau, impl=impl
    )
    everything = _weights(saliency_BTP, torch.zeros_like(undecided_BTP), routing, tau)
    decided = _weights(saliency_BTP, undecided_BTP, routing, tau)
    return Relation(
        *(
            mean_B * ((all_B + DENOMINATOR_EPS) / (decided_B + DENOMINATOR_EPS))
            for mean_B, all_B, decided_B in zip(relation, everything, decided, strict=True)
        )
    )


def _weights(
    saliency_BTP: Tensor, left_out_BTP: Tensor, routing: Routing, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the weights of pairs in the three means of a `Relation`, (B,) each."""
    frames = saliency_BTP.shape[1]
    counted_BTP = (~left_out_BTP).to(saliency_BTP.dtype)
    rows = []
    for frame in range(frames):  # no matrix of all pairs is held
        first_BP11 = saliency_BTP[:, frame, :, None, None]
        weight_BPTP = pair_weight(first_BP11, saliency_BTP[:, None], routing)
        weight_BPTP = weight_BPTP * counted_BTP[:, frame, :, None, None] * counted_BTP[:, None]
        rows.append(weight_BPTP.sum((1, 3)))
    weight_BTT = torch.stack(rows, 1)
    frame_T = torch.arange(frames, device=saliency_BTP.device)
    apart_TT = (frame_T[:, None] - frame_T).abs().to(saliency_BTP.dtype)
    same_TT = (apart_TT == 0).to(saliency_BTP.dtype)
    decay_TT = torch.exp(-apart_TT / tau) * (1.0 - same_TT)
    spatial_B, temporal_B = (
        (weight_BTT * which_TT).sum((1, 2)) for which_TT in (same_TT, decay_TT)
    )
    return spatial_B, temporal_B, weight_BTT.sum((1, 2))


def info_nce(visual_BD: Tensor, text_BD: Tensor, temperature: float = 0.07) -> Tensor:
    """Computes how badly each clip picks its own text among the batch's, (B,), >= 0.

    `-log softmax_j(cos(visual_i, text_j) / temperature)` at j = i: one direction, and every other
    row is a negative (SARA's Stage 1). The gradient reaches both sides. Computed in float32
    (float64 from float64) whatever the input dtype.

    Args:
        visual_BD: one vector per clip and text.
        text_BD: the texts' own vectors, in the same order.
        temperature: 0.07 (paper).

    Raises:
        ValueError: the two shapes differ.
    """
    if visual_BD.shape != text_BD.shape or visual_BD.ndim != 2:
        raise ValueError(
            f"visual {tuple(visual_BD.shape)} and text {tuple(text_BD.shape)} are not (B, D) alike"
        )
    dtype = accumulation_dtype(visual_BD, text_BD)
    with torch.autocast(visual_BD.device.type, enabled=False):
        logits_BB = unit(visual_BD, dtype) @ unit(text_BD, dtype).mT / temperature
    return logits_BB.logsumexp(1) - logits_BB.diagonal()


def _no_decay(tau: object) -> object:
    return None if tau in (math.inf, "inf", ".inf") else tau


class SaraConfig(ObjectiveConfig):
    """Settings of SARA's Stage 2.

    Args:
        blocks: (17,), the paper's layer 18; several blocks are averaged.
        weight: 0.5 (paper).
        routing: "or" (paper), "and", "xor" or "uniform"; see `routed_relation_loss`.
        tau: decay over frames, or None (or infinity) for no decay (paper).
        temporal_weight: 1.0 (paper).
        saliency: "aligner" asks a frozen Stage 1 network about the full caption (paper); "masks"
            takes the data set's masks of all entities. Routing "uniform" reads neither.
        aligner: folder of that Stage 1 network; `alignlab stage1 sara` makes one.
        grid: whose token grid is used: "teacher" resamples the student (ours: that is where the
            saliency lives), "student" averages and resamples teacher and saliency, which makes
            fewer tokens of an image teacher's many.
        projector_dim: hidden width of the projectors, 2048 (ours: REPA's; the paper gives none).
        impl: which implementation compares the relations; see `routed_relation_loss`.
    """

    name: Literal["sara"] = "sara"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (17,)
    teacher: str
    routing: Routing = "or"
    tau: Annotated[float | None, BeforeValidator(_no_decay)] = Field(
        default=None, gt=0.0, allow_inf_nan=False
    )
    temporal_weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    saliency: Literal["aligner", "masks"] = "aligner"
    aligner: str | None = None
    grid: Side = "teacher"
    projector_dim: int = Field(default=REPA_HIDDEN, ge=1)
    impl: Annotated[str, implementation_of(OPERATION)] = "auto"

    @model_validator(mode="after")
    def _aligner_is_there_where_it_is_read(self) -> Self:
        if self.saliency == "masks" and self.aligner is not None:
            raise ValueError("saliency is masks, so `aligner` is never read: leave one of them out")
        if self.saliency == "aligner" and not self.aligner and self.routing != "uniform":
            raise ValueError(
                "saliency is aligner: name the Stage 1 folder in `aligner` (`alignlab stage1 sara` "
                "makes one), or set saliency=masks"
            )
        return self

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """And how much relations between frames count."""
        return super().search_space | {"temporal_weight": NumberRange(0.0, 2.0)}


@final
class Sara(Objective):
    """VideoREPA's relations, each pair of tokens counted by what the caption names.

    One projector per block; blocks are averaged. The saliency comes from a frozen Stage 1 network
    or from masks.
    """

    Config: ClassVar[type[ObjectiveConfig]] = SaraConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2605.07800"

    def __init__(
        self,
        config: SaraConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config: SaraConfig = config
        generator = torch.Generator().manual_seed(seed)
        width = teacher_dims[config.teacher]
        self.projectors = nn.ModuleDict(
            {
                f"block_{block}": repa_projector(
                    student_dim, width, config.projector_dim, generator
                )
                for block in config.blocks
            }
        )
        self.aligner: SaliencyAligner | None = None
        if config.aligner is not None and config.routing != "uniform":
            aligner = load_for_teacher(config.aligner, "sara", config.teacher, width)
            assert isinstance(aligner, SaliencyAligner)
            self.aligner = aligner

    @property
    def needs(self) -> frozenset[Need]:
        if self.config.routing == "uniform":
            return frozenset()
        return frozenset(["masks" if self.config.saliency == "masks" else "text"])

    @property
    def side(self) -> Side:
        return self.config.grid

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        config, features = self.config, teacher[self.config.teacher]
        saliency_BTP = self._saliency(features, context)
        grid = student[config.blocks[0]].grid  # the same in every block
        teacher_BTPD = teacher_on(config.grid, features.tokens_BTPD, features.grid, grid).detach()
        weight_BTP = undecided_BTP = None
        if saliency_BTP is not None:
            weight_BTP = self._on_side(saliency_BTP, features.grid, grid)
        if weight_BTP is not None and context.undecided_BTHW is not None and self._reads_masks:
            share_BTP = pool_masks(context.undecided_BTHW, features.grid)
            share_BTP = self._on_side(share_BTP, features.grid, grid)
            undecided_BTP = share_BTP > FOREGROUND
            # the share of what is decided; as it was where all is
            weight_BTP = weight_BTP / (1.0 - share_BTP.masked_fill(undecided_BTP, 0.0))
            saliency_BTP = weight_BTP = weight_BTP.masked_fill(undecided_BTP, 0.0)
        per_block = []
        for block in config.blocks:
            projected_BND = project(self.projectors[f"block_{block}"], student[block].tokens_BND)
            student_BTPD = student_on(config.grid, projected_BND, grid, features.grid)
            per_block.append(self._relation(student_BTPD, teacher_BTPD, weight_BTP, undecided_BTP))
        mean = mean_relation(per_block)
        parts = {"spatial": mean.spatial.detach(), "temporal": mean.temporal.detach()}
        loss_B = mean.spatial + config.temporal_weight * mean.temporal
        aligned_B = None if saliency_BTP is None else (saliency_BTP > 0).flatten(1).any(1)
        return Terms(loss_B, parts, aligned_B=aligned_B)

    @property
    def _reads_masks(self) -> bool:
        return "masks" in self.needs

    def _on_side(self, values_BTP: Tensor, teacher: Grid, student: Grid) -> Tensor:
        """Brings numbers on the teacher's grid to the one on which tokens are compared."""
        return teacher_on(self.config.grid, values_BTP[..., None], teacher, student)[..., 0]

    def _relation(
        self,
        student_BTPD: Tensor,
        teacher_BTPD: Tensor,
        weight_BTP: Tensor | None,
        undecided_BTP: Tensor | None,
    ) -> Relation:
        config = self.config
        tau = math.inf if config.tau is None else config.tau
        if undecided_BTP is None:
            return relation_distance(
                student_BTPD,
                teacher_BTPD,
                saliency_BTP=weight_BTP,
                routing=config.routing,
                tau=tau,
                impl=config.impl,
            )
        assert weight_BTP is not None
        return decided_relation(
            student_BTPD,
            teacher_BTPD,
            weight_BTP,
            undecided_BTP,
            routing=config.routing,
            tau=tau,
            impl=config.impl,
        )

    @torch.no_grad()
    def _saliency(self, features: Features, context: Context) -> Tensor | None:
        """What the text names, (B, T, P) on the teacher's grid; None where nothing reads it."""
        if self.config.routing == "uniform":
            return None
        if self.aligner is None:
            assert context.masks_BTHW is not None  # `needs` asks for them
            return pool_masks(context.masks_BTHW, features.grid)
        assert context.text_BLD is not None
        trained_dim, text_dim = self.aligner.config.text_dim, context.text_BLD.shape[-1]
        if text_dim != trained_dim:
            raise ValueError(
                f"{self.config.aligner} knows texts of width {trained_dim}, this text encoder's "
                f"have {text_dim}: train Stage 1 with the model of this run"
            )
        # frozen: in the precision of its weights, as teachers are
        with torch.autocast(features.tokens_BTPD.device.type, enabled=False):
            return self.aligner.saliency(features.tokens_BTPD, context.text_BLD)
