"""How much an objective counts at each noise level.

Time `t` runs from 0 (clean) to 1 (pure noise), the flow-matching time divided by 1000.
Shape letters: B batch, S samples of a whole step.
"""

import re
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

MEAN_EPS = 1e-8


class NoGate(BaseModel):
    """1 at every noise level: the formula of every paper here, RefAlign's included."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["none"] = "none"


class VaryingGate(BaseModel):
    """What differs from one noise level to the next.

    Args:
        normalize: weights are divided by their mean over all samples of the step, those of its
            other micro-batches and ranks included, so that the loss is `sum w_b l_b / sum w_b`
            (StableVelocity, arXiv 2602.05435, released code): a gate then moves weight among noise
            levels and takes none away. Samples without anything to align count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    normalize: bool = False


class PowerGate(VaryingGate):
    """`t^p`: most weight at pure noise.

    RefAlign's released code multiplies its loss by t^3; its paper has no gate. The code obtains
    it from a helper whose own description expects the noisy step first and the clean step last,
    but calls it with the two swapped. Whether that is meant or an argument-order slip is not
    known: in the documented order the same call gives (1-t)^3, which is `inverse_power`.

    Args:
        p: the exponent, above 0; RefAlign's code has 3.
    """

    kind: Literal["power"]
    p: float = Field(gt=0.0, allow_inf_nan=False)


class InversePowerGate(VaryingGate):
    """`(1-t)^p`: most weight on clean input; with p=3 RefAlign's gate in the documented order.

    Args:
        p: the exponent, above 0.
    """

    kind: Literal["inverse_power"]
    p: float = Field(gt=0.0, allow_inf_nan=False)


class WindowGate(VaryingGate):
    """1 where `low <= t <= high`, 0 elsewhere.

    Args:
        low: cleanest noise level that counts, 0 to 1.
        high: noisiest noise level that counts, above `low`.
    """

    kind: Literal["window"]
    low: float = Field(ge=0.0, le=1.0)
    high: float = Field(ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _is_not_empty(self) -> "WindowGate":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class SigmoidGate(VaryingGate):
    """`sigmoid(k (tau - t))`: 1 on clean input, 1/2 at `tau`, towards 0 at pure noise.

    StableVelocity (arXiv 2602.05435), whose defaults these are in its released code.

    Args:
        tau: noise level at which it is 1/2.
        k: how steeply it falls there, above 0; 50 is nearly a step.
    """

    kind: Literal["sigmoid"]
    tau: float = Field(default=0.7, ge=0.0, le=1.0)
    k: float = Field(default=20.0, gt=0.0, allow_inf_nan=False)


class SnrGate(VaryingGate):
    """`SNR(t) / (SNR(t) + SNR(tau))` with `SNR(t) = ((1-t) / t)^2`, the signal-to-noise ratio of
    flow matching: 1 on clean input, 1/2 at `tau`, 0 at pure noise.

    StableVelocity (arXiv 2602.05435), whose default this is in its released code.

    Args:
        tau: noise level at which it is 1/2, between 0 and 1.
    """

    kind: Literal["snr"]
    tau: float = Field(default=0.7, gt=0.0, lt=1.0)


_NAMES = ("none", "sigmoid", "snr")  # of gates that need no setting
_FORMULA = re.compile(r"(?P<base>t|\(1-t\))\^(?P<p>\d+(\.\d+)?)")


def _spelled_out(value: object) -> object:
    if not isinstance(value, str) or value in _NAMES:
        return {"kind": value} if isinstance(value, str) else value
    formula = _FORMULA.fullmatch(value.replace(" ", ""))
    if formula is None:
        raise ValueError(
            f"unknown gate {value!r}: choose {', '.join(_NAMES)}, t^p, (1-t)^p (such as t^3), "
            "or a mapping {kind: window, low: ..., high: ...}"
        )
    kind = "power" if formula["base"] == "t" else "inverse_power"
    return {"kind": kind, "p": float(formula["p"])}


# In a recipe: "none", "sigmoid", "snr", "t^3", "(1-t)^3" (any exponent), or a mapping with the kind
# and its settings.
Gate = Annotated[
    NoGate | PowerGate | InversePowerGate | WindowGate | SigmoidGate | SnrGate,
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
        case SigmoidGate():
            return torch.sigmoid(gate.k * (gate.tau - t_B))
        case SnrGate():
            # without a quotient by t, which may be 0
            at_tau = (1.0 - gate.tau) / gate.tau
            signal_B = (1.0 - t_B).clamp_min(0.0)
            return 1.0 / (1.0 + (at_tau * t_B / signal_B) ** 2)


def is_normalized(gate: Gate) -> bool:
    """Whether `gate_weights` are to be divided by `mean_weight` of the whole step."""
    return isinstance(gate, VaryingGate) and gate.normalize


def mean_weight(gate: Gate, t_S: Tensor) -> Tensor:
    """Mean of a gate over all samples of a step, a scalar; at least 1e-8, should all be 0.

    Args:
        gate: from the objective's config.
        t_S: (S,), of every micro-batch and rank.
    """
    return gate_weights(gate, t_S).mean().clamp_min(MEAN_EPS)
