"""How many directions a set of features uses.

Shape letters: N rows, D width.
"""

import torch
from torch import Tensor

from alignlab.metrics.features import feature_rows

_ROUNDING = 1e-12


def effective_rank(features_ND: Tensor) -> float:
    """Effective rank, in [1, min(N, D)]: `exp(-sum_i p_i ln p_i)` with `p_i = s_i / sum_j s_j`.

    The s_i are the singular values of the rows as they are, in float64 (Roy and Vetterli, "The
    effective rank", 2007; RankMe, arXiv 2210.02885, judges collapse by it and adds 1e-7 to each
    p_i, which is left out here). The rows are not centred: rows that have all become one and the
    same give 1, whatever small noise sets them apart. Values below 1e-12 of the largest are
    rounding and count as 0. Rows that are all zero give 0.

    Raises:
        ValueError: not (rows, width), no floating point, no row, NaN or infinity.
    """
    values = torch.linalg.svdvals(feature_rows("features_ND", features_ND))
    values = values[values > _ROUNDING * values[0]]
    if not len(values):
        return 0.0
    share = values / values.sum()
    return float(torch.exp(-(share * share.log()).sum()))
