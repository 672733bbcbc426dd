"""An objective that aligns nothing is refused, stopped or told; another one is not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from alignlab.config.data import ShapesConfig
from alignlab.config.run import RunConfig
from alignlab.data.sample import Reference
from alignlab.data.shapes import dataset as shapes
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.data.video import write_mp4
from alignlab.distributed.ranks import Ranks
from alignlab.errors import UserError
from alignlab.evaluation.run_warnings import alignment_warnings
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.train import RunTrainer, train
from alignlab.training.aligned_samples import (
    STOP_AT_EXPECTED,
    AlignedCount,
    AlignedSamples,
    possible_share,
)
from alignlab.training.batches import is_blank
from alignlab.training.setup import build_run
from command_line import alignlab, refused

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]

KEPT = ("flow.text_dropout=0", "flow.reference_dropout=0", "flow.both_dropout=0")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["data.references=[0,0]"], "data.references: [0, 0] leaves objectives.ra nothing"),
        ([*KEPT[:2], "flow.both_dropout=1"], "reference_dropout + both_dropout is 1"),
        ([*KEPT[:1], "flow.reference_dropout=.9"], "reference_dropout + both_dropout is 1"),
        (["objectives.ra.schedule={kind: stop_at, step: 0}"], "objectives.ra.schedule: it stops"),
        # sigma of the thousand shifted levels begins at 0.00498
        (
            ["objectives.ra.gate={kind: window, low: 0, high: 0.0049}"],
            "objectives.ra.gate: it is 0",
        ),
        (["objectives.ra.gate=(1-t)^100000"], "objectives.ra.gate: it is 0"),
        (["data.references=[9,9]"], "[9, 9] asks for more references than a clip of shapes has"),
        (["data.references=[0,5]"], "[0, 5] asks for more references than a clip of shapes has"),
    ],
)
def test_a_recipe_by_which_nothing_can_be_aligned(
    recipe_file: Path, tmp_path: Path, settings: list[str], named: str
) -> None:
    assert named in refused("train", recipe_file, f"output={tmp_path}", *settings)
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("column", ["references", "subject_image"])
def test_a_folder_without_references(recipe_file: Path, tmp_path: Path, column: str) -> None:
    levels = torch.arange(0, 120, 5, dtype=torch.uint8)
    rows = []
    for name in "abcd":
        write_mp4(tmp_path / f"{name}.mp4", levels[:, None, None, None].expand(24, 48, 48, 3), 12)
        rows.append({"file_name": f"{name}.mp4", "caption": name, column: []})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["data"] = {"name": "folder", "path": str(tmp_path), "frames": 5, "size": [48, 48]}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output": str(tmp_path / "runs"), "eval": {}}))
    result = alignlab("train", path)
    assert result.exit_code == 2
    assert "objectives.ra: aligns reference tokens, and no training clip has a" in result.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_gate_that_some_level_reaches_trains(make_config: MakeConfig) -> None:
    gate = "objectives.ra.gate={kind: window, low: 0, high: 0.005}"
    assert possible_share(make_config(gate, *KEPT), "ra") == pytest.approx(0.001)
    wide = "objectives.ra.gate={kind: window, low: 0.5, high: 1}"
    levels = ["flow.sampler=logit_normal", "flow.shift=1"]
    config = make_config(wide, *levels, "flow.reference_dropout=0.3")
    assert possible_share(config, "ra") == pytest.approx(0.5 * 0.6)


def test_four_references_are_as_many_as_there_are_subjects() -> None:
    clips = ShapesDataset(ShapesConfig(references=(4, 4), train_clips=2), "train")
    assert len(clips[0].references) == 4
    assert clips.share_with_references() == 1.0
    some = ShapesDataset(ShapesConfig(references=(0, 1), train_clips=40), "train")
    drawn = sum(bool(some[index].references) for index in range(40))
    assert 0 < drawn < 40 and some.share_with_references() == drawn / 40


def samples_of(config: RunConfig, with_references: float) -> AlignedSamples:
    return AlignedSamples(config, with_references, Ranks(torch.device("cpu"), "fp32"))


def first(count: int, samples: int = 10) -> dict[str, torch.Tensor]:
    """A step in which the first of its samples have something to align."""
    return {"aligned/ra": torch.arange(samples) < count}


def counter(make_config: MakeConfig, *settings: str) -> AlignedSamples:
    return samples_of(make_config("optim.batch_size=10", *settings), 1.0)


def test_a_run_stops_when_very_many_samples_had_nothing(make_config: MakeConfig) -> None:
    count = counter(make_config)  # keeps references in 8 of 10 samples
    for _ in range(int(STOP_AT_EXPECTED / 0.8 / 10) - 1):
        count.see(first(0))
    assert count.row() == {"aligned/ra": 0.0, "aligned/ra/samples": 1240.0}
    count.see(first(0))
    with pytest.raises(UserError, match=r"^objectives\.ra: none of 1,250 samples had anything"):
        count.row()


def test_few_clips_with_references_are_waited_for(make_config: MakeConfig) -> None:
    few = samples_of(make_config("optim.batch_size=10"), 0.001)
    for _ in range(200):  # by chance, in 20 of 100 runs
        few.see(first(0))
    assert few.row() == {"aligned/ra": 0.0, "aligned/ra/samples": 2000.0}
    few.check_end()


def test_one_clip_in_ten_with_references_never_trips(make_config: MakeConfig) -> None:
    assert (1 - 0.1 * 0.8) ** (STOP_AT_EXPECTED / 0.8) < 1e-40
    assert (1 - 0.01 * 0.8) ** (STOP_AT_EXPECTED / 0.8) < 1e-4
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        count = counter(make_config)
        for step in range(150):
            count.see({"aligned/ra": torch.rand(10, generator=rng) < 0.08})
            if step % 10 == 9:
                count.row()
        count.check_end()


def test_steps_in_which_the_schedule_is_off_are_not_counted(make_config: MakeConfig) -> None:
    count = counter(make_config)
    count.see(first(3))
    count.see({})
    assert count.row() == {"aligned/ra": 0.3, "aligned/ra/samples": 10.0}


def test_a_few_samples_without_references_are_no_error(make_config: MakeConfig) -> None:
    # by chance: two samples in 100 of one clip in 100
    few = samples_of(make_config("optim.batch_size=2"), 0.01)
    few.see(first(0, 2))
    few.check_end()
    (text,) = alignment_warnings(few.counts())
    assert text.startswith("objectives.ra had nothing to align in any sample")
    all_have = samples_of(make_config("optim.batch_size=6"), 1.0)
    all_have.see(first(0, 6))
    with pytest.raises(UserError, match="none of 6 samples"):
        all_have.check_end()


def white(reference: Reference) -> Reference:
    image_HWC = torch.full_like(reference.image_HWC, 255)
    return replace(reference, image_HWC=image_HWC, mask_HW=torch.ones_like(reference.mask_HW))


def transparent(reference: Reference) -> Reference:
    return replace(white(reference), mask_HW=torch.zeros_like(reference.mask_HW))


@pytest.mark.parametrize("spoil", [white, transparent])
def test_blank_references_end_in_an_error(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., Reference]
) -> None:
    draw = shapes.draw_reference
    monkeypatch.setattr(shapes, "draw_reference", lambda *a: spoil(draw(*a)))
    config = make_config("steps=3", *KEPT)
    with pytest.raises(UserError, match=r"^objectives\.ra: none of 6 samples.*missing or blank"):
        train(config)
    assert not list(Path(config.output).rglob("result.json"))


def test_every_rank_stops_at_the_end(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = shapes.draw_reference
    monkeypatch.setattr(shapes, "draw_reference", lambda *a: white(draw(*a)))
    config = make_config("steps=3", *KEPT)
    folder = RunFolder.create(config)
    trainer = RunTrainer(build_run(config))
    monkeypatch.setattr(Ranks, "is_main", False)
    with pytest.raises(UserError, match=r"^objectives\.ra: none of 6 samples"):
        trainer.fit(folder, None)


def test_what_is_blank() -> None:
    image_HWC = torch.full((8, 6, 3), 255, dtype=torch.uint8)
    everything, nothing = torch.ones(8, 6, dtype=torch.bool), torch.zeros(8, 6, dtype=torch.bool)
    assert is_blank(image_HWC, everything) and is_blank(image_HWC, nothing)
    square = nothing.clone()
    square[2:5, 2:5] = True
    assert is_blank(image_HWC, square)  # white on white
    red = image_HWC.clone()
    red[square] = torch.tensor([200, 0, 0], dtype=torch.uint8)
    assert not is_blank(red, square)
    wide = nothing.clone()
    wide[2:6] = True  # a whole picture, fitted into a higher frame
    black = image_HWC.clone()
    black[wide] = 0
    assert is_blank(black, wide)
    black[3, 3] = 90
    assert not is_blank(black, wide)


def test_a_loss_that_no_margin_lets_through_ends_in_an_error(make_config: MakeConfig) -> None:
    videorepa = "{name: videorepa, teacher: dino, blocks: [1], projector_dim: 8, margin: 2}"
    with pytest.raises(UserError, match=r"^objectives\.v: none of 4 samples.*margins"):
        train(make_config(f"objectives.v={videorepa}"))


def test_empty_masks_end_in_an_error(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = ShapesDataset.__getitem__

    def unmasked(dataset: ShapesDataset, index: int) -> object:
        sample = item(dataset, index)
        assert sample.masks_ETHW is not None
        return replace(sample, masks_ETHW=torch.zeros_like(sample.masks_ETHW))

    monkeypatch.setattr(ShapesDataset, "__getitem__", unmasked)
    sara = "{name: sara, teacher: dino, blocks: [1], projector_dim: 8, saliency: masks}"
    with pytest.raises(UserError, match=r"^objectives\.sa: none of 4 samples.*masks or saliency"):
        train(make_config(f"objectives.sa={sara}"))


def test_the_result_counts_and_a_resumed_run_counts_on(
    make_config: MakeConfig, train_until: TrainUntil
) -> None:
    shared = ("steps=6", "checkpoint.every=2", "flow.reference_dropout=0.4", "tracking.log_every=4")
    whole, resumed = make_config(*shared, "name=whole"), make_config(*shared, "name=resumed")
    train(whole)
    train_until(resumed, 5)
    train(resumed)
    one, two = (
        json.loads((Path(c.output) / c.name / "result.json").read_text()) for c in (whole, resumed)
    )
    assert one["aligned"] == two["aligned"]
    aligned, samples = one["aligned"]["ra"]
    assert samples == 12 and 0 < aligned < 12
    last = [row for row in read_rows(Path(whole.output) / "whole/metrics.jsonl")][-2]
    assert (last["aligned/ra"], last["aligned/ra/samples"]) == (aligned / 12, 12.0)


def test_a_step_says_which_samples_had_references(make_config: MakeConfig) -> None:
    run = build_run(make_config("optim.batch_size=4", "flow.reference_dropout=0.5"))
    trainer = RunTrainer(run)
    with run.branch:
        batches = list(trainer.micro_batches())
        kept = [float(len(references) > 0) for b in batches for references in b.references]
        assert 0 < sum(kept) < 4
        scalars = trainer.step(batches)
    assert float(scalars["aligned/ra"]) == sum(kept) / 4


def test_weight_zero_is_measured_and_told(make_config: MakeConfig) -> None:
    nothing = ["objectives.ra.weight=0", "data.references=[0,0]"]
    (text,) = json.loads((train(make_config(*nothing)) / "result.json").read_text())["notes"]
    assert text == "objectives.ra has weight 0: it was measured, and trained nothing"


def test_a_share_below_what_the_recipe_lets_it_is_told() -> None:
    (text,) = alignment_warnings({"ra": AlignedCount(80, 1000, 0.8)})
    assert text.endswith("[8.0% of 1,000 samples, 80.0% possible]")
    assert alignment_warnings({"ra": AlignedCount(790, 1000, 0.8)}) == []
    assert alignment_warnings({"ra": AlignedCount(1000, 1000, 1.0)}) == []
