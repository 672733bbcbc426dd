"""The floor: the matrix products that an operation cannot do without, and nothing else.

Shape letters: L blocks, N tokens, C width, R rows of a panel, K places of a window.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from alignlab.kernels.bench.cases import Case

# Rows of a panel of the triangle: as few as the device multiplies at full speed.
PANEL_ROWS = {"cpu": 256, "cuda": 2048}

WINDOW = 7  # of local_gram, its default

Step = Callable[[], None]


def minimum_flops(case: Case, *, backward: bool) -> int:
    """Counts the FLOPs that values need, and the gradient too if `backward`.

    pull_push: 2 L C for each ordered pair of tokens of different subjects, s_i . t_j; as many for
    the gradient, mask @ t. relation, N tokens: 2 N^2 D, both similarities of every unordered pair;
    as many for the gradient, signs @ v over all ordered pairs. local_gram: 4 D for each token and
    place of the window in the next frame, of student and teacher; as many for the gradient, each
    pair once for the earlier and once for the later token. A multiply-add is two FLOPs.
    Cosines of tokens with their own counterpart, norms and everything elementwise are left out.
    """
    if case.op == "pull_push":
        pairs = case.num_tokens * (case.num_tokens - case.tokens)
        forward = 2 * case.blocks * case.width * pairs
    elif case.op == "relation":
        forward = 2 * case.num_tokens**2 * case.width
    else:
        rows, columns = (_places(side) for side in case.grid)
        forward = 4 * (case.groups - 1) * rows * columns * case.width
    return 2 * forward if backward else forward


def floor_step(case: Case, device: torch.device, *, backward: bool) -> tuple[Step, int]:
    """Builds the products of `case` through `torch.mm`, into buffers that exist already.

    pull_push, for each subject against all tokens before and all after it, all blocks in one
    product: S = s t^T, and in backward mask @ t. These are the minimum FLOPs exactly.

    relation, for each panel of rows: the student's similarities with the columns from the panel on,
    the teacher's likewise, and in backward a full-width panel of signs times v. The triangle has
    steps of one panel, so that forward does up to a panel's height in N more than the minimum.

    local_gram: all tokens but the last frame's times as many columns as a window has places, twice,
    and in backward two products of such scores with as many rows: what lies outside the frame is
    counted. No code can do as few: every token has surroundings of its own.

    Returns:
        The step, and the FLOPs that it does.
    """
    made = {"pull_push": _pull_push, "relation": _relation, "local_gram": _local_gram}
    products = made[case.op](case, device)
    needed = [product for is_backward, product in products if backward or not is_backward]

    def step() -> None:
        for left, right, out in needed:
            torch.mm(left, right, out=out)

    return step, sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in needed)


_Product = tuple[Tensor, Tensor, Tensor]


def _pull_push(case: Case, device: torch.device) -> list[tuple[bool, _Product]]:
    count, rows, width = case.num_tokens, case.blocks * case.tokens, case.width
    teacher_NC = _draw(case, device, count, width)
    student_RC, grad_RC = (_draw(case, device, rows, width) for _ in range(2))
    # One of each for all subjects: longest range of others.
    scores = torch.empty(rows * (count - case.tokens), dtype=case.dtype, device=device)
    mask = (_draw(case, device, rows * (count - case.tokens)) > 0).to(case.dtype)
    products = []
    for subject in range(case.groups):
        start, stop = subject * case.tokens, (subject + 1) * case.tokens
        for others_MC in (teacher_NC[:start], teacher_NC[stop:]):
            if (size := rows * len(others_MC)) == 0:
                continue
            scores_RM, mask_RM = (x[:size].view(rows, -1) for x in (scores, mask))
            products.append((False, (student_RC, others_MC.mT, scores_RM)))
            products.append((True, (mask_RM, others_MC, grad_RC)))
    return products


def _relation(case: Case, device: torch.device) -> list[tuple[bool, _Product]]:
    count, height = case.num_tokens, min(case.num_tokens, PANEL_ROWS[device.type])
    student_NC, teacher_NC, grad_NC = (_draw(case, device, count, case.width) for _ in range(3))
    scores = torch.empty(height * count, dtype=case.dtype, device=device)
    signs = _draw(case, device, height * count).sign()
    products = []
    for start in range(0, count, height):
        rows = slice(start, min(start + height, count))
        size = rows.stop - start
        scores_RM = scores[: size * (count - start)].view(size, -1)
        for x_NC in (student_NC, teacher_NC):
            products.append((False, (x_NC[rows], x_NC[start:].mT, scores_RM)))
        signs_RN = signs[: size * count].view(size, -1)
        products.append((True, (signs_RN, student_NC, grad_NC[rows])))
    return products


def _local_gram(case: Case, device: torch.device) -> list[tuple[bool, _Product]]:
    count = (case.groups - 1) * case.tokens
    student_NC, teacher_NC, grad_NC = (_draw(case, device, count, case.width) for _ in range(3))
    around_KC = _draw(case, device, WINDOW**2, case.width)
    scores_NK = _draw(case, device, count, WINDOW**2)
    out_NK = torch.empty_like(scores_NK)
    forward = [(False, (x_NC, around_KC.mT, out_NK)) for x_NC in (student_NC, teacher_NC)]
    return forward + [(True, (scores_NK, around_KC, grad_NC))] * 2


def _places(side: int) -> int:
    """How many pairs of rows (or columns) of a frame a window's rows (or columns) connect."""
    reach = WINDOW // 2
    return sum(min(side, one + reach + 1) - max(0, one - reach) for one in range(side))


def _draw(case: Case, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(case.dtype)
