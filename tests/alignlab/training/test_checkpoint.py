"""Which checkpoints a run keeps."""

from collections.abc import Callable
from pathlib import Path

from alignlab.config.run import RunConfig
from alignlab.runs.checkpoint_folders import latest
from alignlab.training.setup import build_run
from saved_checkpoints import save

MakeConfig = Callable[..., RunConfig]


def test_the_newest_checkpoints_are_kept_whatever_their_number_of_digits(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    state = build_run(make_config()).state
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        state.step = step
        save(state, tmp_path / "checkpoints", keep=2)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-1000000", "step-1000001"]
    newest = latest(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-1000001"
