"""Which clips a run generates, keeps and measures, and what moves the result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from alignlab.config.data import FolderConfig, ShapesConfig
from alignlab.config.run import RunConfig
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.data.video import write_mp4
from alignlab.errors import UserError
from alignlab.evaluation.collectors import GenerationCollector
from alignlab.evaluation.evaluate import evaluate
from alignlab.evaluation.generation import generate, generated_clip
from alignlab.evaluation.metric_registry import GENERATION_METRICS
from alignlab.metrics import temporal_flickering
from alignlab.runs.run_folder import RunFolder
from alignlab.teachers import Teacher
from alignlab.training.setup import Caches, build_run, new_caches

MakeConfig = Callable[..., RunConfig]
OF_SHAPES = {
    "found_proxy",
    "entities_proxy",
    "motion_proxy",
    "identity_proxy",
    "confusion_proxy",
}
OF_ANY_CLIP = GENERATION_METRICS.keys() - OF_SHAPES
OF_TEACHER = {"identity_proxy", "confusion_proxy", "reference_match_proxy", "frechet"}


def measured_clips(config: RunConfig) -> dict[str, float]:
    """Metrics of what the untrained model generates."""
    found = evaluate(build_run(config), RunFolder.create(config).samples)
    return {name: value for name, value in found.items() if name.startswith("gen")}


def names(found: dict[str, float], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def test_clips_are_measured_beyond_those_that_are_kept(make_config: MakeConfig) -> None:
    config = make_config("eval.generated_clips=3", "eval.sample_clips=1", aligned=False)
    found = measured_clips(config)
    # an untrained model shows no subjects that could be confused; real clips do
    assert names(found, "gen_real/") == OF_SHAPES | OF_ANY_CLIP
    assert names(found, "gen/") | {"confusion_proxy"} == OF_SHAPES | OF_ANY_CLIP
    samples = RunFolder.open(Path(config.output) / config.name).samples
    assert [row["video"] for row in json.loads((samples / "samples.json").read_text())] == ["0.mp4"]
    run = build_run(config)
    with run.branch:
        clips = [generated_clip(run, run.branch, i) for i in range(3)]
    flicker = sum(temporal_flickering(clip) for clip in clips) / 3
    assert found["gen/flicker"] == pytest.approx(flicker, abs=1e-12)
    real = [run.wan.decode(run.val_clips[i].latents_CTHW) for i in range(3)]
    expected = sum(temporal_flickering(clip) for clip in real) / 3
    assert found["gen_real/flicker"] == pytest.approx(expected, abs=1e-12)


def test_a_clip_depends_on_neither_seed_nor_neighbours(make_config: MakeConfig) -> None:
    few = measured_clips(make_config("eval.generated_clips=1", aligned=False))
    run = build_run(make_config("seed=7", "eval.clips=3", "eval.batch_size=2", aligned=False))
    with run.branch:
        clips = {i: generated_clip(run, run.branch, i) for i in (2, 0)}
    assert few["gen/flicker"] == temporal_flickering(clips[0])


def test_two_clips_with_the_same_conditions_have_noise_of_their_own(
    make_config: MakeConfig,
) -> None:
    config = make_config(aligned=False)
    caches = new_caches(config)
    run = build_run(config, caches)
    caches.val.put(2, run.val_clips[0])
    with run.branch:
        clips = [generated_clip(run, run.branch, i) for i in (0, 2)]
    assert not torch.equal(*clips)


def test_left_out_the_kept_clips_are_measured_and_zero_measures_none(
    make_config: MakeConfig,
) -> None:
    kept = measured_clips(make_config("eval.sample_clips=2", "name=kept", aligned=False))
    asked = measured_clips(make_config("eval.generated_clips=2", "name=asked", aligned=False))
    assert kept == asked and kept
    none = make_config("eval.sample_clips=1", "eval.generated_clips=0", "name=none", aligned=False)
    assert measured_clips(none) == {}
    assert (RunFolder.open(Path(none.output) / "none").samples / "0.mp4").exists()


def test_the_trained_weights_are_measured(make_config: MakeConfig) -> None:
    config = make_config("eval.generated_clips=1", aligned=False)
    run, samples = build_run(config), RunFolder.create(config).samples
    with run.branch:
        before = generate(run, run.branch, samples, None)
        run.caches.real_metrics.clear()
        with torch.no_grad():
            for weight in run.wan.transformer.parameters():
                weight.mul_(0.5)
        after = generate(run, run.branch, samples, None)
    assert before["gen/flicker"] != after["gen/flicker"]
    assert names(before, "gen/") == GENERATION_METRICS.keys() - OF_TEACHER
    real = {name for name in before if name.startswith("gen_real/")}
    assert {name: before[name] for name in real} == {name: after[name] for name in real}


def test_runs_that_share_caches_measure_the_real_clips_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_now: list[bytes] = []
    add = GenerationCollector.add

    def watched(collector: GenerationCollector, video_THWC: Tensor, *rest: Any) -> None:
        measured_now.append(video_THWC.numpy().tobytes())
        add(collector, video_THWC, *rest)

    monkeypatch.setattr(GenerationCollector, "add", watched)

    def measured(name: str, caches: Caches, *settings: str) -> tuple[dict[str, float], int]:
        config = make_config(f"name={name}", "eval.generated_clips=2", *settings, aligned=False)
        measured_now.clear()
        found = evaluate(build_run(config, caches), RunFolder.create(config).samples)
        real = {key: value for key, value in found.items() if key.startswith("gen_real/")}
        return real, len(measured_now)

    shared, seed = new_caches(make_config()), "seed=3"
    first, both = measured("first", shared)
    again, generated = measured("again", shared, seed)
    alone, _ = measured("alone", new_caches(make_config()), seed)
    assert (both, generated) == (4, 2)
    assert first == again == alone and first
    fewer, count = measured("fewer", shared, "eval.generated_clips=1")
    assert count == 2 and fewer != first
    other, count = measured("other", shared, "teachers.dino.feature=pre_norm")
    assert count == 4 and other["gen_real/frechet"] != first["gen_real/frechet"]
    assert other["gen_real/flicker"] == first["gen_real/flicker"]


def test_a_folder_of_videos_is_measured_without_ground_truth(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    shapes = make_config().data
    assert isinstance(shapes, ShapesConfig)
    root, rows = tmp_path / "clips", []
    root.mkdir()
    for i in range(3):
        sample = ShapesDataset(shapes, "val")[i]
        write_mp4(root / f"{i}.mp4", sample.video_THWC, 8)
        Image.fromarray(sample.references[0].image_HWC.numpy()).save(root / f"{i}.png")
        rows.append(
            {"file_name": f"{i}.mp4", "caption": sample.caption, "references": [f"{i}.png"]}
        )
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = FolderConfig(path=str(root), frames=5, size=(48, 48), fps=8, val_fraction=0.5)
    config = make_config("eval.generated_clips=1", aligned=False)
    found = measured_clips(config.model_copy(update={"data": data}))
    assert names(found, "gen/") == names(found, "gen_real/") == OF_ANY_CLIP


def test_a_video_teacher_compares_clips_only(make_config: MakeConfig) -> None:
    config = VJEPA2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        crop_size=48,
        frames_per_clip=8,
        pred_hidden_size=12,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    teacher = Teacher(VJEPA2Model(config).eval(), "vjepa2", "post_norm")
    collector = GenerationCollector(teacher, (3, 3), subjects_by_colour=True)
    shapes = make_config("data.frames=9").data
    assert isinstance(shapes, ShapesConfig)
    for i in range(2):
        sample = ShapesDataset(shapes, "val")[i]
        collector.add(sample.video_THWC.flip(0), sample)
    found = collector.metrics()
    of_images = {"identity_proxy", "confusion_proxy", "reference_match_proxy"}
    assert found.keys() == (OF_SHAPES | OF_ANY_CLIP) - of_images
    assert found["frechet"] > 0.0, "it sees the order of frames"


def test_more_clips_than_there_are_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(
        UserError, match=r"eval\.generated_clips: 5 is more than data\.val_clips, 4"
    ):
        make_config("eval.generated_clips=5")
