"""Does a token's nearest neighbour belong to the same subject?

Cosine similarity, float64. A negative label marks padding, which is left out on both sides.
`alignlab.metrics.teacher_retrieval` asks the same across two feature spaces.

Shape letters: N query rows, M gallery rows, D width, K neighbours.
"""

import torch
from torch import Tensor

from alignlab.metrics.features import feature_rows, label_rows, nearest

_CHUNK = 1024


def subject_retrieval(
    query_ND: Tensor,
    query_labels_N: Tensor,
    gallery_MD: Tensor,
    gallery_labels_M: Tensor,
    k: int = 1,
    *,
    leave_one_out: bool = False,
    query_images_N: Tensor | None = None,
    gallery_images_M: Tensor | None = None,
) -> float:
    """Share of query tokens whose nearest gallery token by cosine carries the same label.

    Tokens of one image resemble each other whatever their subject (shared background, position,
    place in the sequence), so with one image per subject a leave-one-out score says "same image",
    not "same subject". Give image ids to leave the query's own image out of the gallery. A query
    without any allowed gallery token of its label cannot succeed and is not counted.

    Args:
        query_ND, query_labels_N: tokens to look up and their subjects.
        gallery_MD, gallery_labels_M: tokens to look in and their subjects.
        k: neighbours that vote; a tie goes to the label of the nearest tied neighbour.
        leave_one_out: query and gallery are the same tokens in the same order; a token is not its
            own neighbour.
        query_images_N, gallery_images_M: int, the image a token is of; given together.

    Raises:
        ValueError: bad shapes or values, k out of range, both kinds of exclusion at once, or no
            query that could succeed.
    """
    query_ND = feature_rows("query_ND", query_ND)
    gallery_MD = feature_rows("gallery_MD", gallery_MD)
    if query_ND.shape[1] != gallery_MD.shape[1]:
        raise ValueError(
            f"query_ND and gallery_MD must have one width, got {query_ND.shape[1]} "
            f"and {gallery_MD.shape[1]}"
        )
    query = _Side("query", query_labels_N, query_ND.shape[0], query_ND.device)
    gallery = _Side("gallery", gallery_labels_M, gallery_MD.shape[0], gallery_MD.device)
    _set_exclusion(query, gallery, leave_one_out, query_images_N, gallery_images_M)
    query_ND, gallery_MD = query_ND[query.real], gallery_MD[gallery.real]
    if not 1 <= k <= gallery_MD.shape[0]:
        raise ValueError(f"k must be in 1 .. {gallery_MD.shape[0]} gallery tokens, got {k}")
    counted_N = _counted(_candidates(query, gallery)[1])
    indices_NK, cosine_NK = nearest(
        query_ND, gallery_MD, k, query_ids_N=query.ids, gallery_ids_M=gallery.ids
    )
    votes_NK = torch.where(cosine_NK.isfinite(), gallery.labels[indices_NK], -1)
    return float((_elected(votes_NK) == query.labels)[counted_N].double().mean())


def retrieval_chance(
    query_labels_N: Tensor,
    gallery_labels_M: Tensor,
    *,
    leave_one_out: bool = False,
    query_images_N: Tensor | None = None,
    gallery_images_M: Tensor | None = None,
) -> float:
    """What `subject_retrieval` with k = 1 gives for neighbours drawn at random.

    The mean, over the same counted queries, of the share of allowed gallery tokens that carry the
    query's label: 1 / S for S subjects with equally many tokens and nothing left out.

    Raises:
        ValueError: as `subject_retrieval`.
    """
    query = _Side("query", query_labels_N, query_labels_N.numel(), query_labels_N.device)
    gallery = _Side("gallery", gallery_labels_M, gallery_labels_M.numel(), query_labels_N.device)
    _set_exclusion(query, gallery, leave_one_out, query_images_N, gallery_images_M)
    allowed_N, positives_N = _candidates(query, gallery)
    counted_N = _counted(positives_N)
    return float((positives_N[counted_N] / allowed_N[counted_N]).mean())


class _Side:
    """Labels and exclusion ids of one side, padding removed."""

    def __init__(self, name: str, labels_N: Tensor, rows: int, device: torch.device) -> None:
        labels_N = label_rows(f"{name} labels", labels_N, rows).to(device)
        self.name = name
        self.rows = rows
        self.real = labels_N >= 0
        self.labels = labels_N[self.real]
        self.ids: Tensor | None = None

    def set_ids(self, ids_N: Tensor) -> None:
        ids_N = label_rows(f"{self.name} images", ids_N, self.rows)
        self.ids = ids_N.to(self.real.device)[self.real]


def _set_exclusion(
    query: _Side,
    gallery: _Side,
    leave_one_out: bool,
    query_images_N: Tensor | None,
    gallery_images_M: Tensor | None,
) -> None:
    if (query_images_N is None) != (gallery_images_M is None):
        raise ValueError("query_images_N and gallery_images_M must be given together")
    if query_images_N is not None and gallery_images_M is not None:
        if leave_one_out:
            raise ValueError("leave_one_out and image ids exclude each other: give one")
        query.set_ids(query_images_N)
        gallery.set_ids(gallery_images_M)
    elif leave_one_out:
        if not torch.equal(query.real, gallery.real) or not torch.equal(
            query.labels, gallery.labels
        ):
            raise ValueError("leave_one_out needs the same tokens as query and gallery")
        query.set_ids(torch.arange(query.rows))
        gallery.set_ids(torch.arange(gallery.rows))


def _candidates(query: _Side, gallery: _Side) -> tuple[Tensor, Tensor]:
    """Per query: how many gallery tokens are allowed, and how many of those have its label."""
    allowed, positives = [], []
    for start in range(0, query.labels.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        same_NM = query.labels[part, None] == gallery.labels
        allowed_NM = torch.ones_like(same_NM)
        if query.ids is not None and gallery.ids is not None:
            allowed_NM = query.ids[part, None] != gallery.ids
        allowed.append(allowed_NM.sum(1))
        positives.append((allowed_NM & same_NM).sum(1))
    if not allowed:
        raise ValueError("every query token is padding")
    return torch.cat(allowed).double(), torch.cat(positives).double()


def _counted(positives_N: Tensor) -> Tensor:
    counted_N = positives_N > 0
    if not bool(counted_N.any()):
        raise ValueError("no query has an allowed gallery token of its own label")
    return counted_N


def _elected(votes_NK: Tensor) -> Tensor:
    """The label with most votes; among equals the one voted for first; -1 is no vote."""
    k = votes_NK.shape[1]
    agreeing_NKK = (votes_NK[:, :, None] == votes_NK[:, None, :]) & (votes_NK >= 0)[:, :, None]
    # Earlier places win ties: k votes weigh more than any difference in place.
    place_K = torch.arange(k, 0, -1, device=votes_NK.device)
    best_N1 = (agreeing_NKK.sum(2) * (k + 1) + place_K).argmax(1, keepdim=True)
    return votes_NK.gather(1, best_N1).squeeze(1)
