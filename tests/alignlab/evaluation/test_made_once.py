"""What no trained weight moves is computed once, for the blocks of a run and for several runs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.evaluation import generation_metrics
from alignlab.evaluation.evaluate import block_metrics, evaluated_model, teacher_of
from alignlab.evaluation.generation import generate
from alignlab.losses.objective import Features
from alignlab.metrics import Neighbours
from alignlab.metrics.copy_paste import subject_templates
from alignlab.teachers import Teacher
from alignlab.training.setup import Caches, build_run, new_caches

MakeConfig = Callable[..., RunConfig]


def test_the_neighbours_of_a_teachers_tokens_are_looked_for_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(make_config("eval.blocks=[1,3]", aligned=False))
    looked: list[str] = []
    of = Neighbours.of

    def watched(features_ND: Tensor, k: int, *, name: str) -> Neighbours:
        looked.append(name)
        return of(features_ND, k, name=name)

    monkeypatch.setattr(Neighbours, "of", watched)
    with evaluated_model(run, (1, 3)) as branch, torch.no_grad():
        block_metrics(run, branch, [run.val_clips[0], run.val_clips[1]], teacher_of(run, "dino"))
    assert looked.count("teacher_NE") == 1
    assert looked.count("student_ND") == 2 * 3, "two blocks at three noise levels"


def test_runs_that_share_caches_look_at_references_and_real_clips_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[bytes] = []
    templates: list[bytes] = []
    encode, cut = Teacher.encode, subject_templates

    def encode_watched(teacher: Teacher, video_BTHWC: Tensor, grid: tuple[int, int]) -> Features:
        encoded.append(video_BTHWC[0].numpy().tobytes())
        return encode(teacher, video_BTHWC, grid)

    def cut_watched(image_HWC: Tensor, mask_HW: Tensor, size: tuple[int, int]) -> object:
        templates.append(image_HWC.numpy().tobytes())
        return cut(image_HWC, mask_HW, size)

    monkeypatch.setattr(Teacher, "encode", encode_watched)
    monkeypatch.setattr(generation_metrics, "subject_templates", cut_watched)

    def generated(name: str, caches: Caches) -> dict[str, float]:
        config = make_config(f"name={name}", "eval.generated_clips=2", aligned=False)
        run = build_run(config, caches)
        # generated clips differ from run to run
        run.wan.transformer.proj_out.weight.data.mul_(0.5 if name == "first" else 1.0)
        with evaluated_model(run) as branch:
            return generate(run, branch, None, teacher_of(run, "dino"))

    caches = new_caches(make_config())
    first = generated("first", caches)
    clips = [build_run(make_config(aligned=False), caches).val_clips[i].sample for i in range(2)]
    of_samples = [clip.video_THWC.numpy().tobytes() for clip in clips]
    images = [[r.image_HWC for r in clip.references] for clip in clips]
    of_samples += [torch.stack(found).numpy().tobytes() for found in images]
    each = [image.numpy().tobytes() for found in images for image in found]
    assert [encoded.count(pixels) for pixels in of_samples] == [1] * 4
    assert sorted(templates) == sorted(each)
    encoded.clear()
    templates.clear()
    second = generated("second", caches)
    assert encoded and not set(encoded) & set(of_samples), "generated clips alone are encoded"
    assert templates == []
    assert second == generated("alone", new_caches(make_config()))
    assert second != first
