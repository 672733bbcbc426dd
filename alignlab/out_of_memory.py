"""Out of memory as one line: where, how much was asked for, which settings need less."""

import os
import re
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

from alignlab.errors import first_line
from alignlab.units import GIB

# What torch says on CUDA (also through cuBLAS and cuDNN), MPS and the CPU, whatever the exception.
_SAID = re.compile(
    r"out of memory|can't allocate memory|not enough memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_CAPACITY = re.compile(
    r"GPU (\d+) has a total capacity of (\S+ \S+) of which (\S+ \S+) is free", re.IGNORECASE
)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class _Place(NamedTuple):
    """Where memory ran out.

    Args:
        module: of the code that was running, or the package that it is in.
        functions: of that module; empty: all.
        doing: as the message says it.
        fix: the settings that need less memory there.
    """

    module: str
    functions: tuple[str, ...]
    doing: str
    fix: str


_FEWER_PIXELS = "take fewer data.frames or a smaller data.size"
_SMALLER = "set model.precision=bf16 and model.train=lora, or take a smaller model.path"
_TEXT = (
    "set model.precision=bf16, in which the text encoder takes half, or on a GPU "
    "model.text_encoder=cpu"
)
_ALONE = "set data.workers=0 where it is more, so that no encoder runs beside a step"
_TRAINING = (
    "raise optim.accumulate (a micro-batch is optim.batch_size / optim.accumulate / ranks samples; "
    "where that is 1, it does not help), set model.gradient_checkpointing=true or "
    f"model.train=lora, {_ALONE}, or {_FEWER_PIXELS}"
)
_OPTIMIZER = (
    "set model.train=lora (AdamW keeps two more fp32 numbers for each trained weight), "
    "optim.name=adamw_8bit or, on a GPU, optim.offload=true"
)
_EVALUATION = f"lower eval.batch_size, or {_FEWER_PIXELS}"
_FIX = f"{_TRAINING}; in an evaluation, {_EVALUATION}"

# Of the frames of a traceback, the innermost that is in the table says where it happened.
_PLACES = (
    _Place(
        "alignlab.models.text_encoder", ("_on_device", "load"), "loading the text encoder", _TEXT
    ),
    _Place("alignlab.models.text_encoder", (), "encoding text", _TEXT),
    _Place(
        "alignlab.models.frozen_parts",
        ("encode_video",),
        "encoding a clip",
        f"{_ALONE}, or {_FEWER_PIXELS}",
    ),
    _Place("alignlab.models.frozen_parts", ("decode",), "decoding a generated clip", _FEWER_PIXELS),
    _Place("alignlab.models.frozen_parts", ("_on_device", "load"), "loading the model", _SMALLER),
    _Place("alignlab.models.pipeline_parts", (), "loading the model", _SMALLER),
    _Place("alignlab.models.wan", ("load_wan",), "loading the model", _SMALLER),
    _Place(
        "alignlab.teachers",
        (),
        "computing the teacher's features",
        f"set teachers.*.grid or a smaller teachers.*.path, {_ALONE}, or {_FEWER_PIXELS}",
    ),
    _Place(
        "alignlab.kernels",
        ("pull_push_eager", "relation_eager"),
        "comparing all tokens with each other",
        "set objectives.*.impl=chunked, or align fewer objectives.*.blocks",
    ),
    _Place("torch.optim", (), "making the optimizer's state", _OPTIMIZER),
    _Place("alignlab.training.optimizer_step", (), "in the optimizer's step", _OPTIMIZER),
    _Place("alignlab.data", (), "reading a clip", _FEWER_PIXELS),
    _Place("alignlab.evaluation", (), "evaluating", _EVALUATION),
    _Place("alignlab.sampling", (), "generating a clip", _FEWER_PIXELS),
    _Place(
        "alignlab.stage1",
        (),
        "training a Stage 1 network",
        f"lower optim.batch_size, or {_FEWER_PIXELS}",
    ),
    _Place("alignlab.train", (), "training", _TRAINING),
)


def out_of_memory_line(error: BaseException) -> str | None:
    """One line about an allocation that failed, on a GPU or the CPU; None: another error.

    Args:
        error: as it was raised; its traceback says what the command was doing.
    """
    if not _is_out_of_memory(error):
        return None
    place = next(filter(None, map(_place_of, _frames(error))), None)
    doing, fix = (place.doing, place.fix) if place else ("", _FIX)
    while_doing = f" while {doing}" if doing else ""
    amount = ", ".join(_amounts(str(error))) or first_line(error) or "no more is free"
    return f"out of memory{while_doing} ({amount}): {fix}"


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError is a RuntimeError as well, and may have no text
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and (named or _SAID.search(str(error)) is not None)
    )


def _frames(error: BaseException) -> Iterator[FrameType]:
    """From the innermost to the outermost."""
    return reversed([frame for frame, _ in traceback.walk_tb(error.__traceback__)])


def _place_of(frame: FrameType) -> _Place | None:
    module, function = str(frame.f_globals.get("__name__")), frame.f_code.co_name
    for place in _PLACES:
        inside = module == place.module or module.startswith(f"{place.module}.")
        if inside and (not place.functions or function in place.functions):
            return place
    return None


def _amounts(text: str) -> list[str]:
    """How much was asked for, and what the device has, as far as the message says."""
    amounts = []
    asked = _ASKED.search(text)
    if asked:
        size = float(asked[1]) * _UNITS[asked[2].lower()]
        amounts.append(f"{size / GIB:.3g} GiB asked for")
    capacity = _CAPACITY.search(text)
    if capacity:
        amounts.append(f"cuda:{capacity[1]} has {capacity[2]}, {capacity[3]} of it free")
    elif asked and "CUDA" not in text and "MPS" not in text:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        amounts.append(f"this machine has {memory / GIB:.3g} GiB")
    return amounts
