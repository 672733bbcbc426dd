"""Alignment losses for video diffusion transformers, compared head to head."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the rooms losses/, kernels/ and experiments/ lie beside this folder, not in it.
_BESIDE = Path(__file__).resolve().parent.parent
if (_BESIDE / "pyproject.toml").is_file():
    __path__.append(str(_BESIDE))
