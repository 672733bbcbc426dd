"""What is measured of a trained model, and that nothing but the model moves it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignlab.config.run import RunConfig
from alignlab.data.registry import build_dataset
from alignlab.evaluation.evaluate import EVAL_SEED, evaluate
from alignlab.randomness import generator
from alignlab.runs.run_folder import RunFolder
from alignlab.train import train
from alignlab.training.flow_matching import flow_loss, interpolate
from alignlab.training.setup import build_run

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]
MEASURES = ("teacher_retrieval", "silhouette", "cross_cos", "cknna")


def measure(config: RunConfig) -> dict[str, float]:
    """Metrics of the untrained model."""
    return evaluate(build_run(config), RunFolder.create(config).samples)


def test_validation_depends_on_neither_seed_nor_batch_size(make_config: MakeConfig) -> None:
    base = ["eval.blocks=[1,3]", "eval.clips=3"]
    first = measure(make_config(*base, aligned=False))
    torch.manual_seed(17)  # global state is not read
    again = measure(make_config(*base, "seed=5", "name=seed", aligned=False))
    assert again == first
    small = measure(make_config(*base, "eval.batch_size=1", "name=small", aligned=False))
    assert small.keys() == first.keys()
    for name, value in first.items():
        assert small[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_other_weights_give_another_validation_loss(make_config: MakeConfig) -> None:
    untrained = measure(make_config(aligned=False))
    path = train(make_config("name=trained", aligned=False))
    trained = json.loads((path / "result.json").read_text())["metrics"]
    assert abs(trained["val/flow"] - untrained["val/flow"]) > 1e-4


def test_a_bin_is_the_flow_loss_at_its_middle(make_config: MakeConfig) -> None:
    config = make_config("eval.clips=1", aligned=False)
    run = build_run(config)
    found = evaluate(run, RunFolder.create(config).samples)
    clip, sigma = run.val_clips[0], torch.tensor([0.75])
    clean = clip.latents_CTHW[None]
    noise = torch.randn(clean.shape[1:], generator=generator(EVAL_SEED, "val-noise", 0, 750))[None]
    noisy = interpolate(clean, noise, sigma)
    with run.branch, torch.no_grad():
        out = run.branch(noisy, sigma * 1000, clip.text_LD[None], [clip.references_KCHW])
    expected = flow_loss(out.velocity_BCTHW, clean, noise)[0]
    torch.testing.assert_close(found["val/flow/t7"], expected.item(), rtol=1e-4, atol=1e-5)
    assert found["val/flow"] == pytest.approx(sum(found[f"val/flow/t{i}"] for i in range(10)) / 10)


def test_a_run_without_objectives_is_probed_at_the_asked_blocks(make_config: MakeConfig) -> None:
    found = measure(make_config("eval.blocks=[1,3]", "eval.clips=4", aligned=False))
    expected = {f"{m}/{at}" for m in MEASURES for at in ("block1", "block3", "mean")}
    expected.add("teacher_retrieval_chance")
    assert {name for name in found if not name.startswith("val/")} == expected
    for name in MEASURES:
        blocks = [found[f"{name}/block1"], found[f"{name}/block3"]]
        assert blocks[0] != blocks[1]
        assert found[f"{name}/mean"] == pytest.approx(sum(blocks) / 2)


def test_aligned_blocks_are_probed_unless_others_are_asked_for(make_config: MakeConfig) -> None:
    found = measure(make_config())
    assert {"cknna/block0", "cknna/block2"} <= found.keys()
    assert "cknna/block1" not in found
    asked = measure(make_config("eval.blocks=[1]", "name=asked"))
    assert "cknna/block1" in asked and "cknna/block0" not in asked


def test_without_a_teacher_only_the_flow_is_validated(make_config: MakeConfig) -> None:
    config = make_config(aligned=False).model_copy(update={"teachers": {}})
    assert all(name.startswith("val/flow") for name in measure(config))


def test_clips_without_references_have_no_reference_metrics(make_config: MakeConfig) -> None:
    path = train(
        make_config("data.references=[0,0]", "eval.sample_clips=1", "objectives.ra.weight=0")
    )
    found = json.loads((path / "result.json").read_text())["metrics"]
    assert {"cknna/block0", "cknna/block2", "val/flow"} <= found.keys()
    for name in ("teacher_retrieval", "silhouette", "cross_cos"):
        assert not any(key.startswith(name) for key in found)
    (clip,) = json.loads((path / "samples" / "samples.json").read_text())
    assert clip["references"] == []


def test_everything_is_measured_with_what_stands_for_absent_references(
    make_config: MakeConfig,
) -> None:
    base = ["data.references=[0,0]", "eval.blocks=[1]", "eval.sample_clips=1"]
    changes = {
        "plain": (),
        "zero": ("model.absent_references=zero",),
        "negative": ("eval.negative_prompt=wan",),
    }
    found = {
        name: measure(make_config(*base, *change, f"name={name}", aligned=False))
        for name, change in changes.items()
    }
    plain, zero, negative = found.values()
    assert plain.keys() == zero.keys() == negative.keys()
    assert not any("silhouette" in key or "retrieval" in key for key in zero)
    for key in ("val/flow/t3", "cknna/block1", "gen/contrast"):
        assert zero[key] != plain[key]
    assert negative["gen/contrast"] != plain["gen/contrast"]  # of generated clips alone
    assert all(negative[key] == plain[key] for key in plain if not key.startswith("gen/"))


def test_evaluation_leaves_the_model_as_it_was(make_config: MakeConfig) -> None:
    config = make_config("optim.ema=0.5", "eval.sample_clips=1")
    run = build_run(config)
    assert run.state.ema is not None
    for value in run.state.ema.values():
        value.add_(0.01)
    before = {name: p.clone() for name, p in run.state.transformer.state_dict().items()}
    evaluate(run, RunFolder.create(config).samples)
    after = run.state.transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run.state.transformer.training
    assert not any(block._forward_hooks for block in run.state.transformer.blocks)


def test_samples_are_listed_and_exist(make_config: MakeConfig) -> None:
    config = make_config("eval.sample_clips=2", "data.references=[1,3]")
    folder = RunFolder.create(config)
    evaluate(build_run(config), folder.samples)
    rows = json.loads((folder.samples / "samples.json").read_text())
    clips = build_dataset(config.data, "val")
    assert len(rows) == 2
    listed = {"samples.json"}
    for i, row in enumerate(rows):
        assert (row["key"], row["caption"]) == (clips[i].key, clips[i].caption)
        assert len(row["references"]) == len(clips[i].references) > 0
        listed |= {row["video"], row["real"], *row["references"]}
    on_disk = {p.name for p in folder.samples.iterdir()}
    assert on_disk == listed
    assert all((folder.samples / name).stat().st_size > 100 for name in listed)


def test_no_samples_when_none_are_asked_for(full_run: Path) -> None:
    assert not (full_run / "samples").exists()
