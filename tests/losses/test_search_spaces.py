"""Where sweeps search each objective's settings unless told otherwise: every end of it is valid."""

from typing import Any

import pytest

from alignlab.losses.objective import ObjectiveConfig
from alignlab.losses.registry import BUILT_IN
from alignlab.losses.search_space import Choice, DepthRange, NumberRange, SearchRange, tenfold
from objective_settings import teacher_of

NEEDED: dict[str, dict[str, Any]] = {
    "sara": {"aligner": "stage1"},
    "moalign": {"head": "stage1"},
    "m2_repa": {"teacher": ["dino", "early"]},
}


def default_config(name: str) -> ObjectiveConfig:
    given = {"teacher": "dino"} if teacher_of(name, "") else {}
    return BUILT_IN[name].Config(**(given | NEEDED.get(name, {})))


def ends(searched: SearchRange, num_blocks: int) -> list[Any]:
    match searched:
        case NumberRange(low=low, high=high):
            return [low, high]
        case Choice(values=values):
            return list(values)
        case DepthRange():
            blocks = searched.blocks(num_blocks)
            return [[blocks[0]], [blocks[-1]]]


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("num_blocks", [4, 30])
def test_every_combination_of_ends_makes_a_config(name: str, num_blocks: int) -> None:
    config = default_config(name)
    space = config.search_space
    assert list(space)[:2] == ["weight", "blocks"]
    corners: list[dict[str, Any]] = [{}]
    for setting, searched in space.items():
        assert setting in type(config).model_fields
        corners = [c | {setting: end} for c in corners for end in ends(searched, num_blocks)]
    for corner in corners:
        found = type(config).model_validate(config.model_dump() | corner)
        assert max(found.tapped_blocks) < num_blocks


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_papers_values_lie_inside(name: str) -> None:
    """But for blocks, which are of models of other depths."""
    config = default_config(name)
    for setting, searched in config.search_space.items():
        if isinstance(searched, NumberRange):
            assert searched.low <= getattr(config, setting) <= searched.high
            assert searched.low > 0 or not searched.log


def test_refalign_may_take_the_papers_first_nine_of_thirty() -> None:
    blocks = default_config("refalign").search_space["blocks"]
    assert isinstance(blocks, DepthRange)
    assert set(range(9)) <= set(blocks.blocks(30)) and blocks.longest(30) >= 9
    assert blocks.longest(4) == 1 and list(blocks.blocks(8)) == [0, 1, 2, 3]


def test_what_another_setting_leaves_unread_is_not_searched() -> None:
    plain = default_config("irepa").model_copy(update={"spatial_norm": False})
    assert "gamma" in default_config("irepa").search_space and "gamma" not in plain.search_space


def test_depths_count_as_papers_do_and_share_no_block() -> None:
    lower, upper = DepthRange(up_to=0.5), DepthRange(above=0.5)
    for count in (1, 2, 7, 8, 30):
        assert [*lower.blocks(count), *upper.blocks(count)] == list(range(count))
    assert not lower.blocks(1), "a depth of 1 is not shallow"
    assert list(DepthRange(above=0.1, up_to=0.3).blocks(30)) == [3, 4, 5, 6, 7, 8]
    assert tenfold(0.2) == NumberRange(0.02, 2.0, log=True)
