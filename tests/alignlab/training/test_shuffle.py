"""Shuffled teachers: features of other clips at other places, whatever kind of teacher it is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignlab.experiments.compare.config import differing_settings
from alignlab.experiments.compare.fairness import measured_differently
from alignlab.train import train
from alignlab.training.cache_build import build_cache
from alignlab.training.encoded import FeatureRead
from alignlab.training.setup import Run, build_run
from alignlab.training.shuffle import other_clip, shuffled_references, shuffled_video
from command_line import refused
from run_contents import timeless_metrics, timeless_rows
from tiny_runs import MakeConfig

REPA = "objectives.p={name: repa, teacher: dino, blocks: [1], projector_dim: 16}"
DIT = (
    "teachers.dit={{family: diffusion, path: {wan}, feature: 'layer:1'}}",
    "objectives.d={{name: repa, teacher: dit, blocks: [1], projector_dim: 16}}",
)
SHUFFLED = "teachers.dino.shuffle=true"


def sorted_rows(tokens: Tensor) -> list[list[float]]:
    return sorted(tokens.reshape(-1, tokens.shape[-1]).tolist())


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_every_clip_gets_another_one(count: int) -> None:
    others = [other_clip(index, count) for index in range(count)]
    assert sorted(others) == list(range(count))
    assert all(other != index for index, other in enumerate(others))


def test_tokens_go_to_other_places() -> None:
    rows = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
    first, second = shuffled_video(rows, 0), shuffled_video(rows, 1)
    assert first.shape == rows.shape
    assert sorted_rows(first) == sorted_rows(second) == sorted_rows(rows)
    moved = (first != rows).any(-1).float().mean()
    assert moved > 0.5 and not torch.equal(first, second)
    assert torch.equal(first, shuffled_video(rows, 0))
    # each reference keeps its own tokens, and other numbers of references are made up for
    for count, sources in ((2, [0, 1]), (3, [0, 1, 0]), (1, [0])):
        found = shuffled_references(rows, 0, count)
        assert found.shape == (count, 9, 4)
        for image, source in zip(found, sources, strict=True):
            assert sorted_rows(image) == sorted_rows(rows[source])
            assert not torch.equal(image, rows[source])


@pytest.mark.parametrize("mode", ["off", "write"])
def test_features_are_a_permutation_of_other_clips(
    make_config: MakeConfig, wan_folder: Path, mode: str
) -> None:
    """With one clip in a batch, of videos and of references, of encoders and diffusion teachers."""
    settings = [one.format(wan=wan_folder) for one in DIT]
    shuffled = (SHUFFLED, "teachers.dit.shuffle=true", "data.references=[0,3]")
    run = build_run(make_config(REPA, *settings, *shuffled, f"data.cache.mode={mode}"))
    reads = run.alignment.reads(0)
    assert all(read.is_shuffled for read in reads)
    assert {(read.teacher.name, read.kind) for read in reads} == {
        ("teachers (dinov2)", "reference"),
        ("teachers (dinov2)", "video"),
        ("teachers.dit", "video"),
    }
    for read in reads:
        _check_read(run, read)


def _check_read(run: Run, read: FeatureRead) -> None:
    clips = [run.clips[i] for i in range(len(run.clips))]
    if read.kind == "reference":
        clips = [clip for clip in clips if clip.pixels.names]
        assert 2 <= len(clips)
    own = [clip.features(read._replace(is_shuffled=False)) for clip in clips]
    found = [clip.features(read) for clip in clips]
    assert [one.shape for one in found] == [one.shape for one in own]
    sources = []
    for place, tokens in enumerate(found):
        image = tokens if read.kind == "video" else tokens[0]
        rows = sorted_rows(image)
        whole = (one if read.kind == "video" else one[0] for one in own)
        same = [i for i, one in enumerate(whole) if sorted_rows(one) == rows]
        assert len(same) == 1 and same[0] != place
        assert not torch.equal(image, own[same[0]] if read.kind == "video" else own[same[0]][0])
        sources += same
    assert sorted(sources) == list(range(len(clips)))


def test_a_control_is_said_and_read_from_the_same_cache(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_config(REPA, "name=plain")
    control = make_config(REPA, "name=control", SHUFFLED, "data.cache.mode=require")
    build_cache([plain])
    one = train(plain)
    assert "shuffled" not in caplog.text
    two = train(control)
    said = "teachers.dino is shuffled: a negative control"
    assert caplog.text.count(said) == 1
    assert said in (two / "result.json").read_text()
    first, second = timeless_rows(one)[1], timeless_rows(two)[1]
    assert first["loss/flow"] == second["loss/flow"] and first["loss/p"] != second["loss/p"]
    # both are measured against the teacher as it is
    runs = {"plain": plain, "control": control.model_copy(update={"data": plain.data})}
    assert measured_differently(runs) == {}
    assert differing_settings(runs)["teachers.dino.shuffle"] == {"plain": False, "control": True}
    assert timeless_metrics(one).keys() == timeless_metrics(two).keys()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["objectives.ra=null"], "needs two train clips or more, not 1"),
        ([], "needs two train clips with references or more, not 1"),
    ],
)
def test_one_clip_cannot_be_shuffled(
    recipe_file: Path, tmp_path: Path, settings: list[str], expected: str
) -> None:
    settings = ["data.train_clips=1", REPA, SHUFFLED, *settings]
    line = refused("train", recipe_file, f"output={tmp_path}", *settings)
    assert f"teachers.dino.shuffle: {expected}" in line
