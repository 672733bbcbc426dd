"""What the sweep of a variant searches: the learning rate, and what its objectives offer."""

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.tuned import is_within
from alignlab.experiments.sweep.config import (
    BlocksSpace,
    CategoricalSpace,
    FloatSpace,
    IntSpace,
    Parameter,
)
from alignlab.experiments.sweep.space import num_blocks_of
from alignlab.experiments.tune.config import TuneConfig
from alignlab.losses.search_space import Choice, DepthRange, NumberRange, SearchRange

LR = "optim.lr"
LR_FACTOR = 5.0
LR_MOST = 1.0


def variant_space(
    tune: TuneConfig, base: RunConfig, variant: str, run: RunConfig
) -> dict[str, Parameter]:
    """What the sweep of a variant searches, by dotted key.

    The same in all variants first: the learning rate, without which a variant without objectives
    would have nothing to tune and the others would be tuned at its cost.

    Args:
        tune: of the recipe.
        base: the run that all variants share.
        variant: its name.
        run: its own run.

    Raises:
        UserError: nothing is left to search, or the depth of a model that is not here is needed.
    """
    space: dict[str, Parameter | None] = {LR: _learning_rates(base.optim.lr), **tune.space}
    own = tune.spaces.get(variant, {})
    for alias, objective in run.objectives.items():
        for setting, searched in objective.search_space.items():
            key = f"objectives.{alias}.{setting}"
            # `weight` stands for `weight.gradient_share` as well
            is_own = is_within(key, own)
            space[key] = None if is_own else parameter(key, searched, variant, run)
    space |= own
    left = {key: one for key, one in space.items() if one is not None}
    if not left:
        raise UserError(f"tune.spaces.{variant}: nothing is left to search")
    return left


def parameter(key: str, searched: SearchRange, variant: str, run: RunConfig) -> Parameter:
    """A range that an objective offers, as a sweep has it.

    Raises:
        UserError: no block lies there, or the depth of the model is not known.
    """
    match searched:
        case NumberRange(low=int() as low, high=int() as high, log=log):
            return IntSpace(kind="int", low=low, high=high, log=log)
        case NumberRange(low=low, high=high, log=log):
            return FloatSpace(kind="float", low=low, high=high, log=log)
        case Choice(values=values):
            return CategoricalSpace(kind="categorical", choices=values)
        case DepthRange():
            return _blocks(key, searched, variant, run)


def _learning_rates(own: float) -> Parameter:
    low, high = (float(f"{rate:.6g}") for rate in (own / LR_FACTOR, own * LR_FACTOR))
    return FloatSpace(kind="float", low=low, high=min(high, LR_MOST), log=True)


def _blocks(key: str, searched: DepthRange, variant: str, run: RunConfig) -> Parameter:
    count = num_blocks_of(run)
    if count is None:
        raise UserError(
            f"tune.spaces.{variant}.{key}: blocks are searched by their share of the depth, and "
            f"the model {run.model.path} is not here: fetch it, or write a space of kind: blocks"
        )
    blocks = searched.blocks(count)
    if not blocks:
        raise UserError(
            f"tune.spaces.{variant}.{key}: none of the transformer's {count} blocks lies above "
            f"{searched.above:g} and up to {searched.up_to:g} of the depth: write a space of kind: "
            "blocks, or null"
        )
    first, last = blocks[0], blocks[-1]
    longest = searched.longest(count)
    if longest == 1:
        return BlocksSpace(kind="blocks", choose="single", first=first, last=last)
    return BlocksSpace(kind="blocks", choose="range", first=first, last=last, max_size=longest)
