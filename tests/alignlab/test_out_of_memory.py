"""Out of memory, wherever a command meets it: one line with the setting to change, exit code 1."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import Dinov2Model, UMT5EncoderModel

from alignlab.config.run import RunConfig
from alignlab.models.wan import checked_pipeline, frozen_parts
from alignlab.out_of_memory import out_of_memory_line
from command_line import alignlab

ADAM = import_module("torch.optim.adam")  # torch.optim has no such attribute
CUDA = (
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 79.25 GiB of "
    "which 10.25 GiB is free. Including non-PyTorch memory, this process has 68.99 GiB memory in "
    "use.\nSee documentation for Memory Management"
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 21474836480 bytes. Error code 12 (Cannot allocate memory)"
)


def fails(*arguments: Any, **options: Any) -> NoReturn:
    raise torch.OutOfMemoryError(CUDA)


def failing_if(with_gradient: bool) -> Callable[..., Any]:
    forward = WanTransformer3DModel.forward

    def maybe(*arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() == with_gradient:
            fails()
        return forward(*arguments, **options)

    return maybe


def line_of(*arguments: object) -> str:
    result = alignlab(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: out of memory"), result.stderr
    (line,) = (one for one in result.stderr.splitlines() if one.startswith("error: "))
    return line


@pytest.mark.parametrize(
    ("module", "name", "failing", "doing", "setting"),
    [
        (WanTransformer3DModel, "forward", failing_if(True), "training", "optim.accumulate"),
        (WanTransformer3DModel, "forward", failing_if(False), "evaluating", "eval.batch_size"),
        (AutoencoderKLWan, "encode", fails, "encoding a clip", "data.frames"),
        (AutoencoderKLWan, "to", fails, "loading the model", "model.train=lora"),
        (UMT5EncoderModel, "forward", fails, "encoding text", "model.precision=bf16"),
        (UMT5EncoderModel, "to", fails, "loading the text encoder", "model.text_encoder=cpu"),
        (Dinov2Model, "forward", fails, "computing the teacher's features", "data.size"),
        (ADAM, "adam", fails, "making the optimizer's state", "model.train=lora"),
        (torch.autograd, "backward", fails, "training", "model.gradient_checkpointing=true"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_training_names_the_setting(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    failing: Callable[..., Any],
    doing: str,
    setting: str,
) -> None:
    monkeypatch.setattr(module, name, failing)
    line = line_of("train", recipe_file, f"output={tmp_path}")
    what = f"out of memory while {doing} (20.5 GiB asked for, cuda:0 has 79.25 GiB, 10.25 GiB of it"
    assert what in line
    assert setting in line.split("): ", 1)[1]


def test_evaluating_a_finished_run_names_the_batch_size(
    full_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanTransformer3DModel, "forward", fails)
    assert "evaluating" in (line := line_of("evaluate", full_run)) and "eval.batch_size" in line


def test_eager_kernels_name_the_implementation(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignlab.kernels.pull_push.accumulation_dtype", fails)
    line = line_of("train", recipe_file, f"output={tmp_path}", "objectives.ra.impl=eager")
    assert "objectives.*.impl=chunked" in line


def test_a_cpu_that_has_no_more_says_how_much_it_has() -> None:
    line = out_of_memory_line(RuntimeError(CPU))
    assert line is not None and line.startswith("out of memory (20 GiB asked for, this machine has")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    line = out_of_memory_line(caught.value)
    assert line is not None and "4.19e+06 GiB asked for" in line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_all_ways_to_say_it(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: RunConfig) -> NoReturn:
        raise error

    monkeypatch.setattr("alignlab.train.train", train)
    line = line_of("train", "tiny")
    assert "optim.accumulate" in line and "eval.batch_size" in line


@pytest.mark.parametrize(
    ("owner", "name", "use", "doing"),
    [
        (AutoencoderKLWan, "encode", "encode_image", "encoding a clip"),
        (AutoencoderKLWan, "decode", "decode", "decoding a generated clip"),
        (AutoencoderKLWan, "to", "decode", "loading the model"),
        (UMT5EncoderModel, "to", "encode_text", "loading the text encoder"),
        (UMT5EncoderModel, "forward", "encode_text", "encoding text"),
    ],
)
def test_what_frozen_parts_were_doing(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, use: str, doing: str
) -> None:
    frozen = frozen_parts(checked_pipeline("assets/tiny-wan"), precision="fp32", device="cpu")
    given: dict[str, Any] = {
        "encode_image": torch.zeros(32, 32, 3, dtype=torch.uint8),
        "decode": torch.zeros(len(frozen.vae_config["latents_mean"]), 1, 4, 4),
        "encode_text": ["a circle"],
    }
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        getattr(frozen, use)(given[use])
    assert f"out of memory while {doing} (" in str(out_of_memory_line(caught.value))


def test_other_runtime_errors_are_not_out_of_memory() -> None:
    assert out_of_memory_line(RuntimeError("shapes differ")) is None
    assert out_of_memory_line(ValueError("out of memory")) is None
