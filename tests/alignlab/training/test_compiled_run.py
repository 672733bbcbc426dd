"""Whole runs whose blocks are compiled: numbers, checkpoints, resuming."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignlab.config.run import RunConfig
from alignlab.models import compiled_blocks
from alignlab.train import train
from run_contents import timeless_rows

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]

# a second forward pass with other weights, an average that is evaluated, backward passes that are
# repeated, and blocks that run again
SETTINGS = (
    "objectives.s={name: sra, blocks: [0], deep_blocks: [2], projector_dim: 16, ema: 0.5}",
    "optim.accumulate=2",
    "optim.ema=0.5",
    "tracking.diagnose_every=2",
    "model.gradient_checkpointing=every:2",
    "data.references=[0, 3]",
    "checkpoint.every=1",
)


def saved(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(run)}/{name}": tensor
        for path in run.glob("checkpoints/*/**/*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.slow  # compiles seven variants in each of three runs: a minute
def test_a_compiled_run_has_the_numbers_of_an_eager_one_and_resumes_exactly(
    make_config: MakeConfig, train_until: TrainUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_blocks, "BACKEND", "aot_eager")
    eager = train(make_config("name=eager", *SETTINGS))
    whole = train(make_config("name=whole", *SETTINGS, "model.compile=blocks"))
    resumed = make_config("name=resumed", *SETTINGS, "model.compile=blocks")
    train_until(resumed, 1)
    again = train(resumed)
    assert timeless_rows(again) == timeless_rows(whole)
    mine, expected = saved(again), saved(whole)
    assert mine.keys() == expected.keys() == saved(eager).keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    for row, plain in zip(timeless_rows(whole), timeless_rows(eager), strict=True):
        for name in [key for key in plain if key.startswith("loss/")]:
            assert row[name] == pytest.approx(plain[name], rel=1e-5), name
