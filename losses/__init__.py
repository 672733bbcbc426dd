"""Alignment objectives. Their formulas, defaults and sources are in README.md beside this file."""

from alignlab.losses.registry import OBJECTIVES as OBJECTIVES
from alignlab.losses.registry import build_objective as build_objective
