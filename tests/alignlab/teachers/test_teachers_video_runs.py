"""A video teacher as the one that tokens are measured against."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import VJEPA2Config, VJEPA2Model

from alignlab.config.run import RunConfig
from alignlab.evaluation.collectors import VideoCollector
from alignlab.evaluation.evaluate import evaluate
from alignlab.losses.objective import Tokens
from alignlab.metrics import cknna
from alignlab.models.taps import BlockTokens
from alignlab.runs.run_folder import RunFolder
from alignlab.teachers import Teacher, load_teacher
from alignlab.training.setup import build_run
from made_clips import pixel_batch

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VJEPA2Model(config)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    path = tmp_path_factory.mktemp("vjepa2")
    model.save_pretrained(path)
    return path


def test_a_run_is_measured_against_a_video_teacher(make_config: MakeConfig, folder: Path) -> None:
    config = make_config(
        "data.frames=9",
        "teachers.clip.family=vjepa2",
        f"teachers.clip.path={folder}",
        "eval.teacher=clip",
        "eval.blocks=[1,3]",
        aligned=False,
    )
    found = evaluate(build_run(config), RunFolder.create(config).samples)
    measures = ("silhouette", "cross_cos", "cknna")
    expected = {f"{m}/{at}" for m in measures for at in ("block1", "block3", "mean")}
    assert {name for name in found if not name.startswith("val/")} == expected
    assert found["cknna/mean"] == pytest.approx((found["cknna/block1"] + found["cknna/block3"]) / 2)
    image = evaluate(
        build_run(
            config.model_copy(update={"eval": config.eval.model_copy(update={"teacher": "dino"})})
        ),
        RunFolder.create(config.model_copy(update={"name": "image"})).samples,
    )
    assert {name: image[name] for name in expected if "cknna" not in name} == {
        name: found[name] for name in expected if "cknna" not in name
    }


@pytest.mark.parametrize("grid", [None, (1, 2)])
def test_the_frame_that_a_video_teacher_left_out_is_not_measured(
    folder: Path, grid: tuple[int, int] | None
) -> None:
    teacher = load_teacher("vjepa2", path=str(folder), grid=grid)
    rng = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (2, 9, 32, 64, 3), generator=rng, dtype=torch.uint8)
    tokens = torch.randn(2, 3 * 8, 6, generator=rng)
    found = _measured(teacher, video, tokens)
    other_first = tokens.clone()
    other_first[:, :8] = torch.randn(2, 8, 6, generator=rng)
    assert _measured(teacher, video, other_first) == found
    teacher_BTPD = teacher.encode(video, grid or (2, 4)).tokens_BTPD
    latent = teacher_BTPD.unflatten(1, (2, 2)).mean(2)  # two tubelets for a latent frame
    if grid is not None:
        image = latent.flatten(0, 1).mT.reshape(4, 24, *grid)
        image = torch.nn.functional.interpolate(image, (2, 4), mode="bilinear")
        latent = image.flatten(2).mT
    expected = cknna(tokens[:, 8:].reshape(-1, 6), latent.reshape(-1, 24), k=10)
    assert found == pytest.approx(expected, abs=1e-5)


def _measured(teacher: Teacher, video: torch.Tensor, tokens: torch.Tensor) -> float:
    batch = pixel_batch(list(video), sigma_B=torch.full((2,), 0.5))
    reference = Tokens(tokens[:, :0], (0, 2, 4))
    collector = VideoCollector(2)
    collector.add({0: BlockTokens(Tokens(tokens, (3, 2, 4)), reference)}, batch, teacher)
    return collector.metrics()["cknna/block0"]
