"""Damaged files of models: one line that names the file and what to do."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignlab.errors import UserError
from alignlab.models.model_files import check_model_files
from alignlab.models.wan import load_text_encoder, load_wan
from alignlab.runs.log_filters import quiet_libraries
from alignlab.teachers import load_teacher
from damage import a_list, cut, delete, empty, folder, garbage, pointer

Damage = Callable[[Path], None]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
JSON = (
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
)


@pytest.fixture
def wan(wan_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan_folder, tmp_path / "wan"))


def refused(load: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", [empty, cut, garbage, folder, pointer], ids=lambda d: d.__name__)
@pytest.mark.parametrize("file", [WEIGHTS, VAE, TEXT, *JSON])
def test_a_damaged_file_of_wan(wan: Path, file: str, damage: Damage) -> None:
    damage(wan / file)
    line = refused(lambda: load_wan(str(wan)))
    assert line.startswith("model.path: ")
    if (file, damage) == ("model_index.json", folder):
        assert line.endswith("has no model_index.json")
        return
    assert str(wan / file) in line
    assert ("git lfs pull" if damage is pointer else "fetch it again") in line


@pytest.mark.parametrize("file", [f for f in JSON if not f.startswith("tokenizer/tokenizer_c")])
def test_json_that_is_no_object(wan: Path, file: str) -> None:
    a_list(wan / file)
    line = refused(lambda: load_wan(str(wan)))
    assert f"{wan / file} holds a list where an object" in line


@pytest.mark.parametrize("file", JSON)
def test_settings_that_are_missing_are_no_default_s(wan: Path, file: str) -> None:
    (wan / file).unlink()
    line = refused(lambda: load_wan(str(wan)))
    assert Path(file).name in line or file == "tokenizer/tokenizer.json"


def test_nothing_is_printed_besides_the_line(
    wan: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = wan / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"d_ff": 64', '"d_ff": 128'))
    (wan / WEIGHTS).rename(wan / "transformer" / "other.safetensors")
    with quiet_libraries():  # as every command has it
        for load in (lambda: load_text_encoder(str(wan)), lambda: load_wan(str(wan))):
            refused(load)
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")


@pytest.mark.parametrize("file", [TEXT, "tokenizer/tokenizer.json"])
def test_the_text_encoder_alone_is_looked_at_as_well(wan: Path, file: str) -> None:
    cut(wan / file)
    assert str(wan / file) in refused(lambda: load_text_encoder(str(wan)))


@pytest.mark.parametrize("file", [WEIGHTS, VAE, TEXT])
def test_a_weight_of_another_shape(wan: Path, file: str) -> None:
    tensors = load_file(wan / file)
    name = max(tensors, key=lambda n: tensors[n].ndim)
    tensors[name] = torch.ones(3, 3)
    save_file(tensors, wan / file)
    assert str((wan / file).parent) in refused(lambda: load_wan(str(wan)))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_settings_that_make_no_model(wan: Path, part: str) -> None:
    (wan / part / "config.json").write_text(
        '{"num_layers": "four", "z_dim": "x", "num_heads": "y", "base_dim": "z", "d_kv": "k"}'
    )
    assert str(wan / part) in refused(lambda: load_wan(str(wan)))


def test_a_missing_shard(wan: Path) -> None:
    index = wan / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    (wan / WEIGHTS).rename(wan / "transformer" / "one.safetensors")
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    line = refused(lambda: load_wan(str(wan)))
    assert f"{index} names two.safetensors, which is not there" in line
    index.write_text("{}")
    assert f"{index} has no weight_map" in refused(lambda: load_wan(str(wan)))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "damage", [empty, cut, garbage, folder, pointer, delete], ids=lambda d: d.__name__
)
def test_a_damaged_file_of_a_teacher(
    teacher_folder: Path, tmp_path: Path, file: str, damage: Damage
) -> None:
    teacher = Path(shutil.copytree(teacher_folder, tmp_path / "dino"))
    damage(teacher / file)
    line = refused(lambda: load_teacher("dinov2", path=str(teacher)))
    assert line.startswith("teachers") and str(teacher) in line
    if damage is not delete and (file, damage) != ("config.json", folder):
        assert str(teacher / file) in line


def test_whole_folders_pass(wan_folder: Path, teacher_folder: Path) -> None:
    for part in (wan_folder, *(p for p in wan_folder.iterdir() if p.is_dir()), teacher_folder):
        check_model_files(part, setting="model.path")
