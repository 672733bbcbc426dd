"""Washed-out samples give a warning that a run keeps; sound ones do not."""

import json
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alignlab.config.data import ShapesConfig
from alignlab.config.run import RunConfig
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.evaluation.collectors import GenerationCollector
from alignlab.evaluation.run_warnings import LEAST, sample_warnings
from alignlab.train import train

MakeConfig = Callable[..., RunConfig]
CLIPS = ShapesDataset(ShapesConfig(frames=5, size=(64, 64), references=(2, 3)), "val")
SAMPLES = [CLIPS[i] for i in range(4)]


def warnings_of(change: Callable[[Tensor], Tensor], clips: int = 4) -> list[str]:
    """Warnings about the real clips after a change."""
    metrics: dict[str, float] = {}
    for prefix, spoil in (("gen", change), ("gen_real", lambda video: video)):
        collector = GenerationCollector(None, (4, 4), subjects_by_colour=True)
        for sample in SAMPLES:
            collector.add(spoil(sample.video_THWC), sample)
        metrics |= {f"{prefix}/{name}": value for name, value in collector.metrics().items()}
    return sample_warnings(metrics, clips)


def towards(video_THWC: Tensor, target: Tensor, share: float) -> Tensor:
    mixed = share * video_THWC.double() + (1 - share) * target
    return mixed.round().clamp(0, 255).byte()


def pale(video_THWC: Tensor, share: float) -> Tensor:
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    return towards(video_THWC, (video_THWC.double() @ luma)[..., None], share)


def faded(video_THWC: Tensor, share: float) -> Tensor:
    return towards(video_THWC, torch.tensor(128.0), share)


def test_sound_clips_give_no_warning() -> None:
    for change in (lambda v: v, lambda v: faded(v, 0.75), lambda v: pale(v, 0.75)):
        assert warnings_of(change) == []


def test_lost_colour_and_lost_contrast_are_told_apart() -> None:
    (note,) = warnings_of(lambda video: pale(video, 0.5))
    assert note.startswith("generated clips have less than 67% of the real clips' colourfulness")
    both = warnings_of(lambda video: faded(video, 0.5))
    assert ["contrast" in note for note in both] == [True, False]
    assert both[1] == note.replace(note[note.index("[") :], both[1][both[1].index("[") :])
    shown, _, real = both[1].split("[")[1].removesuffix("]").split()
    assert float(shown) == pytest.approx(float(real) / 2, rel=0.05)


def test_overdone_clips_give_a_warning_of_their_own() -> None:
    (note,) = warnings_of(lambda video: pale(video, 2.0))
    assert "more than 150% of the real clips' colourfulness" in note and "guidance" in note


def test_few_clips_and_colourless_ones_give_none() -> None:
    assert warnings_of(lambda video: pale(video, 0.0), clips=3) == []
    grey = {"gen/colourfulness": 1.0, "gen_real/colourfulness": 8.0}
    assert sample_warnings(grey, 12) == []
    assert sample_warnings({"val/flow": 0.3}, 0) == []
    blank = {"gen/contrast": 0.1, "gen_real/contrast": 0.0}
    assert sample_warnings(blank, 12) == []


def test_a_run_whose_samples_are_grey_notes_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def grey(*args: object, **options: object) -> Tensor:
        return torch.full((5, 48, 48, 3), 128, dtype=torch.uint8)

    monkeypatch.setattr("alignlab.evaluation.generation.generated_clip", grey)
    # real clips of a random autoencoder have no colours of their own
    monkeypatch.setitem(LEAST, "colourfulness", 0.0)
    with caplog.at_level(logging.WARNING, "alignlab"):
        run = train(make_config("steps=1", "eval.generated_clips=4", aligned=False))
    notes = json.loads((run / "result.json").read_text())["notes"]
    assert [record.getMessage() for record in caplog.records] == notes
    assert ["contrast" in note for note in notes] == [True, False]
    assert all(" [0 of " in note for note in notes)
