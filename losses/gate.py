"""How much an objective counts at each noise level.

Time `t` runs from 0 (clean) to 1 (pure noise), the flow-matching time divided by 1000.
Shape letters: B batch.
"""

import re
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor


class NoGate(BaseModel):
    """1 at every noise level: the formula of every paper here, RefAlign's included."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["none"] = "none"


class PowerGate(BaseModel):
    """`t^p`: most weight at pure noise.

    RefAlign's released code multiplies its loss by t^3; its paper has no gate. The code obtains
    it from a helper whose own description expects the noisy step first and the clean step last,
    but calls it with the two swapped. Whether that is meant or an argument-order slip is not
    known: in the documented order the same call gives (1-t)^3, which is `inverse_power`.

    Args:
        p: the exponent, above 0; RefAlign's code has 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["power"]
    p: float = Field(gt=0.0, allow_inf_nan=False)


class InversePowerGate(BaseModel):
    """`(1-t)^p`: most weight on clean input; with p=3 RefAlign's gate in the documented order.

    Args:
        p: the exponent, above 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["inverse_power"]
    p: float = Field(gt=0.0, allow_inf_nan=False)


class WindowGate(BaseModel):
    """1 where `low <= t <= high`, 0 elsewhere.

    Args:
        low: cleanest noise level that counts, 0 to 1.
        high: noisiest noise level that counts, above `low`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["window"]
    low: float = Field(ge=0.0, le=1.0)
    high: float = Field(ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _is_not_empty(self) -> "WindowGate":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


_FORMULA = re.compile(r"(?P<base>t|\(1-t\))\^(?P<p>\d+(\.\d+)?)")


def _spelled_out(value: object) -> object:
    if not isinstance(value, str) or value == "none":
        return {"kind": value} if isinstance(value, str) else value
    formula = _FORMULA.fullmatch(value.replace(" ", ""))
    if formula is None:
        raise ValueError(
            f"unknown gate {value!r}: choose none, t^p, (1-t)^p (such as t^3), "
            "or a mapping {kind: window, low: ..., high: ...}"
        )
    kind = "power" if formula["base"] == "t" else "inverse_power"
    return {"kind": kind, "p": float(formula["p"])}


# In a recipe: "none", "t^3", "(1-t)^3" (any exponent), or a mapping with the kind and its settings.
Gate = Annotated[
    NoGate | PowerGate | InversePowerGate | WindowGate,
    Field(discriminator="kind"),
    BeforeValidator(_spelled_out),
]


def gate_weights(gate: Gate, t_B: Tensor) -> Tensor:
    """Computes the factor of each sample's loss at its noise level.

    Args:
        gate: from the objective's config.
        t_B: (B,) in [0, 1], 1 = pure noise. Divide timesteps on the 0..1000 scale by 1000 first;
            the range is not checked, since that would stall a GPU in every step.

    Returns:
        (B,), of the dtype and on the device of `t_B`.
    """
    match gate:
        case NoGate():
            return torch.ones_like(t_B)
        case PowerGate():
            return t_B**gate.p
        case InversePowerGate():
            # Rounding may put t a hair above 1, and a fractional power of that would be NaN.
            return (1.0 - t_B).clamp_min(0.0) ** gate.p
        case WindowGate():
            return ((t_B >= gate.low) & (t_B <= gate.high)).to(t_B.dtype)
