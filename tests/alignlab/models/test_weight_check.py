"""Weights that are not finite or all zero are refused before training, by file and name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignlab.errors import UserError
from alignlab.models.weight_check import check_weights
from command_line import refused

Spoil = Callable[[dict[str, Tensor]], None]


def spoilt(folder: Path, into: Path, part: str, spoil: Spoil) -> Path:
    """A copy of a model's folder with other weights in one part."""
    shutil.copytree(folder, into)
    (path,) = (into / part).glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    spoil(tensors)
    save_file(tensors, path, {"format": "pt"})
    return into


def put(prefix: str, value: float) -> Spoil:
    def spoil(tensors: dict[str, Tensor]) -> None:
        name = next(n for n in sorted(tensors) if n.startswith(prefix) and tensors[n].ndim > 1)
        tensors[name].view(-1)[-1] = value

    return spoil


def zero(prefix: str) -> Spoil:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                tensor.zero_()

    return spoil


NOT_FINITE, ALL_ZERO = "not finite (NaN or inf)", "weight matrices are zero"


@pytest.mark.parametrize(
    ("part", "spoil", "named", "reason"),
    [
        ("transformer", put("blocks.2.", torch.nan), "blocks.2.", NOT_FINITE),
        ("transformer", zero(""), "transformer", ALL_ZERO),
        ("vae", put("decoder.", torch.nan), "decoder.", NOT_FINITE),
        ("vae", put("encoder.", torch.inf), "encoder.", NOT_FINITE),
        ("vae", zero("decoder."), "vae, decoder", ALL_ZERO),
        ("vae", zero("encoder."), "vae, encoder", ALL_ZERO),
        ("text_encoder", put("encoder.", -torch.inf), "encoder.", NOT_FINITE),
        ("text_encoder", zero(""), "text_encoder", ALL_ZERO),
    ],
)
def test_a_part_of_wan(
    recipe_file: Path,
    wan_folder: Path,
    tmp_path: Path,
    part: str,
    spoil: Spoil,
    named: str,
    reason: str,
) -> None:
    path = spoilt(wan_folder, tmp_path / "wan", part, spoil)
    message = refused("train", recipe_file, f"output={tmp_path / 'runs'}", f"model.path={path}")
    assert f"model.path: {path / part}" in message
    assert named in message and reason in message
    assert not list(tmp_path.rglob("metrics.jsonl"))


def deaf(tensors: dict[str, Tensor]) -> None:
    """Patches no longer reach the tokens, which are those of their places alone."""
    zero("embeddings.patch_embeddings.")(tensors)


@pytest.mark.parametrize(
    ("spoil", "reason", "measured_only"),
    [
        (put("encoder.layer.1.", torch.nan), NOT_FINITE, False),
        (put("encoder.layer.1.", torch.nan), NOT_FINITE, True),
        (zero(""), ALL_ZERO, False),
        (deaf, "gives the same features whatever it sees", False),
    ],
)
def test_a_teacher(
    recipe_file: Path,
    teacher_folder: Path,
    tmp_path: Path,
    spoil: Spoil,
    reason: str,
    measured_only: bool,
) -> None:
    path = spoilt(teacher_folder, tmp_path / "dino", ".", spoil)
    settings = [f"teachers.dino.path={path}"]
    if measured_only:
        settings = [f"teachers.other={{family: dinov2, path: {path}}}", "eval.teacher=other"]
    message = refused("train", recipe_file, f"output={tmp_path / 'runs'}", *settings)
    assert str(path) in message and reason in message
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_latents_that_cannot_be_normalised(
    recipe_file: Path, wan_folder: Path, tmp_path: Path
) -> None:
    path = spoilt(wan_folder, tmp_path / "wan", "vae", lambda tensors: None)
    config = path / "vae/config.json"
    text = config.read_text()
    start = text.index('"latents_std": [') + len('"latents_std": [')
    config.write_text(text[:start] + "0.0" + text[text.index(",", start) :])
    message = refused("train", recipe_file, f"output={tmp_path / 'runs'}", f"model.path={path}")
    assert f"{config}: latents_mean must be finite, and latents_std" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors(dtype: torch.dtype) -> None:
    sound = {"a": torch.ones(2, 2, dtype=dtype), "b": torch.zeros(2, dtype=dtype)}
    check_weights("x", sound.items())
    empty = {"none": torch.empty(0, dtype=dtype), "count": torch.tensor(3)}
    check_weights("x", (sound | empty).items())
    broken = {**sound, "c": torch.tensor([1.0, torch.nan], dtype=dtype)}
    with pytest.raises(UserError, match=r"^x: c is not finite \(NaN or inf\); fetch it again$"):
        check_weights("x", broken.items())
    two = {**broken, "d": torch.tensor([torch.inf], dtype=dtype)}
    with pytest.raises(UserError, match=r"^x: c and 1 more are not finite"):
        check_weights("x", two.items())
    zeros = {"a": torch.zeros(2, 2, dtype=dtype), "bias": torch.ones(2, dtype=dtype)}
    with pytest.raises(UserError, match=r"^x: all 1 weight matrices are zero"):
        check_weights("x", zeros.items())
    check_weights("x", zeros.items(), may_be_zero=True)
