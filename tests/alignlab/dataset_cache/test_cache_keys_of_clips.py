"""What each cached value depends on: one input is changed at a time, and that is a miss."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from alignlab.config.run import RunConfig
from alignlab.data.registry import build_dataset
from alignlab.data.video import write_mp4
from alignlab.dataset_cache import clip_keys
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.model_parts import model_parts
from alignlab.errors import UserError
from alignlab.models.wan import frozen_parts, load_wan
from alignlab.recipe import load_run
from alignlab.teachers import load_teacher, teacher_from
from alignlab.training.batches import ClipEncoder
from alignlab.training.clip_memory import ClipMemory
from alignlab.training.encoded import FeatureRead

MakeConfig = Callable[..., RunConfig]

ALL = {"text": 1, "video": 1, "reference": 1, "teacher": 2}
PIXELS = {"video": 1, "reference": 1, "teacher": 2}
GRID = (3, 3)


def misses(config: RunConfig, *, slice_size: int = 16) -> dict[str, int]:
    """What is not in the cache of the first train clip; afterwards it is."""
    row = config.teachers["dino"]
    wan = load_wan(config.model.path, precision=config.model.precision)
    teacher = load_teacher(
        row.family, path=row.path, feature=row.feature, grid=row.grid, slice_size=slice_size
    )
    values = EncodedValues.of(config.data.cache, config.output)
    clips = ClipEncoder(wan.frozen, build_dataset(config.data, "train"), values, ClipMemory(0))
    clip = clips[0]
    for kind in ("video", "reference"):
        clip.features(FeatureRead(teacher, kind, teacher.grid or GRID))
    values.flush()
    counts = values.cache.counts
    return {kind: count.misses for kind, count in counts.items() if count.misses}


def test_what_is_unchanged_is_a_hit(make_config: MakeConfig) -> None:
    assert misses(make_config()) == ALL
    assert misses(make_config()) == {}
    others = ["name=b", "seed=4", "optim.lr=1", "data.train_clips=9", "data.fps=4", "steps=9"]
    assert misses(make_config(*others, "model.train=lora")) == {}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.seed=1", ALL),
        ("data.frames=9", PIXELS),
        ("data.size=[64,48]", PIXELS),
        ("data.references=[1,1]", ALL),  # one subject alone
        ("model.precision=bf16", {"text": 1}),
        ("teachers.dino.feature=pre_norm", {"teacher": 2}),
        ("teachers.dino.feature='layer:0'", {"teacher": 2}),
        ("teachers.dino.grid=[2,2]", {"teacher": 2}),
    ],
)
def test_settings_of_a_value(
    make_config: MakeConfig, override: str, expected: dict[str, int]
) -> None:
    misses(make_config())
    assert misses(make_config(override)) == expected
    assert misses(make_config(override)) == {}


def test_the_slices_of_a_teacher(make_config: MakeConfig) -> None:
    misses(make_config())
    assert misses(make_config(), slice_size=2) == {"teacher": 2}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("vae", {"video": 1, "reference": 1}),
        ("text_encoder", {"text": 1}),
        ("transformer", {}),
        ("teacher", {"teacher": 2}),
    ],
)
def test_a_weight(
    make_config: MakeConfig, tmp_path: Path, part: str, expected: dict[str, int]
) -> None:
    config = make_config()
    misses(config)
    source = Path(str(config.teachers["dino"].path if part == "teacher" else config.model.path))
    copy = shutil.copytree(source, tmp_path / "copy")
    setting = "teachers.dino.path" if part == "teacher" else "model.path"
    assert misses(make_config(f"{setting}={copy}")) == {}  # the same files elsewhere
    (file,) = (copy if part == "teacher" else copy / part).glob("*.safetensors")
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert misses(make_config(f"{setting}={copy}")) == expected


def test_the_tokenizer(make_config: MakeConfig, tmp_path: Path) -> None:
    misses(make_config())
    copy = shutil.copytree(make_config().model.path, tmp_path / "copy")
    file = copy / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"model_max_length": 77}))
    assert misses(make_config(f"model.path={copy}")) == {"text": 1}


def test_a_processor_config_that_normalises_otherwise(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    misses(make_config())
    copy = shutil.copytree(str(make_config().teachers["dino"].path), tmp_path / "copy")
    values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (copy / "preprocessor_config.json").write_text(json.dumps(values))
    assert misses(make_config(f"teachers.dino.path={copy}")) == {"teacher": 2}


def test_threads_and_libraries(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    misses(make_config())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 64)
        assert misses(make_config()) == ALL
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX")
        assert misses(make_config()) == ALL
    with monkeypatch.context() as patch:
        patch.setattr("alignlab.dataset_cache.model_parts.libraries", lambda *names: "torch 99")
        assert misses(make_config()) == ALL
    with monkeypatch.context() as patch:
        patch.setattr("alignlab.models.text_encoder.TEXT_PACKAGES", ())
        assert misses(make_config()) == {"text": 1}
    assert misses(make_config()) == {}


def test_a_required_entry_that_differs_in_threads_says_so(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    misses(make_config())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    line = (
        r"of model\.threads=64 \(the nearest has model\.threads=3; .*OMP_NUM_THREADS=3, or launch"
    )
    with pytest.raises(UserError, match=line):
        misses(make_config("data.cache.mode=require"))


def test_what_a_gpu_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    parts = model_parts(torch.bfloat16, torch.device("cuda"))
    assert parts["build"] == f"torch {torch.__version__}, cuDNN 91002" and "threads" not in parts


def test_code(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    misses(make_config())
    versions: dict[Any, int] = dict(clip_keys.VERSIONS)
    monkeypatch.setattr(clip_keys, "VERSIONS", versions)
    for kind in ALL:
        with monkeypatch.context() as patch:
            patch.setitem(versions, kind, 999)
            assert misses(make_config()) == {kind: ALL[kind]}
    with monkeypatch.context() as patch:
        patch.setattr("alignlab.data.shapes.dataset.WORLD_VERSION", 999)
        assert misses(make_config()) == PIXELS


class Folder:
    """Two videos of one reference each, in a folder that a test changes."""

    def __init__(self, path: Path, recipe: Path) -> None:
        self.path, self.recipe, self._output = path, recipe, path.parent / "runs"
        path.mkdir()
        self.write_video("a.mp4", 1)
        self.write_video("b.mp4", 2)
        self.write_image("a.png", 3)
        self.write_image("b.png", 4)
        self.rows: list[dict[str, object]] = [
            {"file_name": f"{name}.mp4", "text": name, "references": [f"{name}.png"]}
            for name in "ab"
        ]

    def write_video(self, name: str, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        video = torch.randint(0, 256, (24, 48, 64, 3), generator=rng, dtype=torch.uint8)
        write_mp4(self.path / name, video, 8)

    def write_image(self, name: str, seed: int, size: int = 40) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(self.path / name)

    def misses(self, *overrides: str) -> dict[str, int]:
        lines = "".join(json.dumps(row | {"split": s}) + "\n" for row, s in self.splits())
        (self.path / "metadata.jsonl").write_text(lines)
        data = f"data={{name: folder, path: {self.path}, frames: 5, size: [48, 48], fps: 8}}"
        return misses(load_run(self.recipe, [f"output={self._output}", data, *overrides]))

    def splits(self) -> list[tuple[dict[str, object], str]]:
        return list(zip(self.rows, ("train", "val"), strict=True))


@pytest.fixture
def folder(tmp_path: Path, recipe_file: Path) -> Folder:
    made = Folder(tmp_path / "clips", recipe_file)
    assert made.misses() == ALL and made.misses() == {}
    return made


def test_a_caption(folder: Folder) -> None:
    folder.rows[0]["text"] = "another"
    assert folder.misses() == {"text": 1}


def test_a_pixel_of_a_video(folder: Folder) -> None:
    folder.write_video("a.mp4", 5)
    assert folder.misses() == {"video": 1, "teacher": 1}


def test_a_pixel_of_a_reference(folder: Folder) -> None:
    folder.write_image("a.png", 5)
    assert folder.misses() == {"reference": 1, "teacher": 1}


def test_another_video(folder: Folder) -> None:
    folder.rows[0]["file_name"] = "b.mp4"
    folder.rows[1]["file_name"] = "a.mp4"
    assert folder.misses() == {"video": 1, "teacher": 1}


def test_what_is_called_otherwise_is_the_same(folder: Folder) -> None:
    folder.rows[0]["reference_names"] = ["somebody"]
    (folder.path / "a.mp4").rename(folder.path / "c.mp4")
    folder.rows[0]["file_name"] = "c.mp4"
    assert folder.misses() == {}


def test_where_a_clip_begins(folder: Folder) -> None:
    folder.rows[0]["start"] = 1.0
    assert folder.misses() == {"video": 1, "teacher": 1}


def test_more_references(folder: Folder) -> None:
    folder.rows[0]["references"] = ["a.png", "b.png"]
    assert folder.misses() == {"reference": 1, "teacher": 1}
    assert folder.misses("data.references=[0,1]") == {"reference": 1, "teacher": 1}  # one of them


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.fps=4", {"video": 1, "teacher": 1}),
        ("data.frames=9", {"video": 1, "teacher": 1}),
        ("data.size=[48,64]", PIXELS),  # crop and resize of both
    ],
)
def test_how_files_are_read(folder: Folder, override: str, expected: dict[str, int]) -> None:
    assert folder.misses(override) == expected


@pytest.mark.parametrize(
    "what", ["alignlab.data.folder.DECODING_VERSION", "alignlab.data.folder.media_libraries"]
)
def test_the_code_that_reads_files(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(what, 999 if what.isupper() or "VERSION" in what else lambda: "av 99")
    assert folder.misses() == PIXELS


def test_a_file_that_changes_meanwhile_is_not_kept_under_its_old_digest(folder: Folder) -> None:
    config = load_run(folder.recipe, [f"data={{name: folder, path: {folder.path}, frames: 5, "
                                       "size: [48, 48], fps: 8}"])  # fmt: skip
    clips = build_dataset(config.data, "train")
    clips.origin(0)
    clips[0]
    folder.write_video("a.mp4", 9)
    with pytest.raises(UserError, match=r"a\.mp4 has changed since it was hashed"):
        clips[0]


def test_a_clip_without_references_reads_no_autoencoder_for_them(make_config: MakeConfig) -> None:
    config = make_config("data.references=[0,0]")
    counted = Counter(dict.fromkeys(("text", "video"), 1))
    values = EncodedValues.of(config.data.cache, config.output)
    wan = load_wan(config.model.path)
    clips = ClipEncoder(wan.frozen, build_dataset(config.data, "train"), values, ClipMemory(0))
    assert clips[0].references_KCHW.shape[0] == 0 and not clips[0].shows_reference
    values.flush()
    found = {k: count.written for k, count in values.cache.counts.items() if count.written}
    assert found == counted
    assert teacher_from(config.teachers["dino"], device="cpu").identity


def test_a_file_that_cannot_be_read_is_part_of_no_key(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run(folder.recipe, [f"data={{name: folder, path: {folder.path}, frames: 5, "
                                       "size: [48, 48], fps: 8}"])  # fmt: skip
    clips = build_dataset(config.data, "train")
    (folder.path / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png is missing"):
        clips.origin(0)

    def unreadable(*_: object) -> NoReturn:
        raise PermissionError

    monkeypatch.setattr("alignlab.runs.file_digests._Memory.get", lambda *_: None)
    monkeypatch.setattr("alignlab.runs.file_digests._file_digest", unreadable)
    with pytest.raises(UserError, match="is unreadable"):
        _ = load_wan(config.model.path).frozen.vae_parts
    with pytest.raises(UserError, match="is unreadable"):
        _ = teacher_from(config.teachers["dino"], device="cpu", load=False).parts


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "teacher"])
def test_a_model_that_changes_between_its_key_and_its_loading_is_refused(
    make_config: MakeConfig, tmp_path: Path, part: str
) -> None:
    config = make_config()
    source = Path(str(config.teachers["dino"].path if part == "teacher" else config.model.path))
    copy = shutil.copytree(source, tmp_path / "copy")

    def loading() -> Callable[[], object]:
        if part == "teacher":
            teacher = load_teacher("tiny-dino", path=str(copy), load=False)
            assert teacher.parts
            return teacher.digest
        frozen = frozen_parts(copy, precision="fp32", device="cpu")
        assert frozen.vae_parts and frozen.text.parts
        return frozen.load

    loading()()
    load = loading()
    folder = copy if part == "teacher" else copy / part
    file = next(folder.glob("*config.json"))
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match=f"{folder} has changed since it was hashed"):
        load()
