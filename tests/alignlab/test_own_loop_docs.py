"""docs/own-loop.md: every block is run, in order, on the models that are shipped."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOC = Path(__file__).parents[2] / "docs" / "own-loop.md"
NEW_LINES = 14  # beyond those that a script has without alignlab


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)```", DOC.read_text(), flags=re.M | re.S)


def test_the_loops_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    setup, plain, accelerated, references, teacher = blocks()

    exec(setup, names)
    transformer = names["transformer"]
    before = {n: p.detach().clone() for n, p in transformer.named_parameters()}
    exec(plain, names)
    scalars = {n: float(v) for n, v in names["aligned"].scalars().items()}
    assert -1 <= scalars["loss/repa"] < 1 and scalars["aligned/repa"] == 1
    assert any(not torch.equal(p, before[n]) for n, p in transformer.named_parameters())
    assert not any(block._forward_hooks for block in transformer.blocks)
    assert (tmp_path / "finetuned" / "diffusion_pytorch_model.safetensors").is_file()

    exec(accelerated, names)
    assert names["step"] == 1 and math.isfinite(float(names["loss"].detach()))
    saved = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert {"model.safetensors", "model_1.safetensors"} <= set(saved)

    exec(references, names)
    aligned = names["aligned"]
    assert aligned.counted["ra"].all() and float(aligned.terms["ra"].parts["push"].sum()) > 0

    exec(teacher, names)
    names["alignment"].detach()


@pytest.mark.parametrize("number", [1, 2])
def test_few_lines_are_new(number: int) -> None:
    lines = [line for line in blocks()[number].splitlines() if "# +" in line]
    assert 8 <= len(lines) <= NEW_LINES
