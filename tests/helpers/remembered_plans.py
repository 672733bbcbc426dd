"""Plans of runs, which take a second each: those of equal settings are found once."""

from collections.abc import Iterator
from typing import Any

import pytest

from alignlab.config.run import RunConfig
from alignlab.experiments.plan import comparison
from alignlab.experiments.plan.comparison import cost_key
from alignlab.plan import run_plan
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_encoders import EncoderCosts, encoder_costs
from alignlab.plan.run_plan import RunPlan

_plans: dict[tuple[str, int], RunPlan] = {}
_encoders: dict[str, EncoderCosts] = {}
_found_anew = run_plan.plan_run


def plan_run(
    config: RunConfig, architectures: Architectures, *, gpus: int = 1, **_: Any
) -> RunPlan:
    """As `alignlab.plan.run_plan.plan_run`."""
    key = (cost_key(config), gpus)
    if key not in _plans:
        model = config.model_dump_json(include={"model": {"path", "precision"}, "data": True})
        if model not in _encoders:
            _encoders[model] = encoder_costs(config, architectures)
        _plans[key] = _found_anew(config, architectures, gpus=gpus, encoders=_encoders[model])
    return _plans[key]


@pytest.fixture(scope="module")
def remembered_plans() -> Iterator[None]:
    """Plans of recipes and of changes are remembered as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "plan_run", plan_run)
        yield
