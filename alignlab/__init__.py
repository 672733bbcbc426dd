"""Alignment losses for video diffusion transformers, compared head to head."""

from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In a checkout the rooms losses/, kernels/ and experiments/ lie beside this folder, not in it.
_BESIDE = Path(__file__).resolve().parent.parent
if (_BESIDE / "pyproject.toml").is_file():
    __path__.append(str(_BESIDE))

if TYPE_CHECKING:
    from alignlab.own_loop import Clips as Clips
    from alignlab.own_loop import attach as attach
    from alignlab.training.alignment import Alignment as Alignment

_IN_OWN_LOOP = ("Alignment", "Clips", "attach")


def __getattr__(name: str) -> object:
    # Not imported above: torch and diffusers take seconds, and most commands do without.
    if name not in _IN_OWN_LOOP:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from alignlab import own_loop

    return getattr(own_loop, name)
