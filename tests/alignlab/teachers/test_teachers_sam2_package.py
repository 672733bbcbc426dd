"""SAM 2 from Meta's checkpoints, through the package `sam2`, against transformers' class."""

import ast
import importlib.util
import inspect
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Sam2HieraDetConfig, Sam2HieraDetModel

from alignlab.config.parts import TeacherConfig
from alignlab.errors import UserError
from alignlab.teachers import TEACHERS, Teacher, load_teacher
from alignlab.teachers.sam2_package import (
    PREFIX,
    RELEASED,
    HieraTrunk,
    config_name_of,
    read_config,
)

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("sam2") is None,
    reason="needs Meta's package, which `make setup` installs: pip install --no-deps sam2==1.1.0",
)
RENAMED = (
    ("patch_embed.proj.", "patch_embed.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".mlp.layers.0.", ".mlp.proj_in."),
    (".mlp.layers.1.", ".mlp.proj_out."),
)
"""Meta's names and transformers'."""


def _weights(config: str) -> dict[str, Tensor]:
    """Random weights of a backbone, in half precision to be small on disk, by Meta's names."""
    model = HieraTrunk(read_config(Path("a.pt"), config))
    rng = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor] = {}
    for name, like in model.trunk.state_dict().items():
        fan_in = like[0].numel() if like.ndim > 1 else 100
        value = torch.empty(like.shape).normal_(0, fan_in**-0.5, generator=rng)
        drawn[name] = (value + ("norm" in name and name.endswith("weight"))).half()
    return drawn


def _save(path: Path, weights: dict[str, Tensor]) -> str:
    named = {PREFIX + name: value for name, value in weights.items()}
    torch.save({"model": named | {"no_mem_embed": torch.zeros(1, 1, 256)}}, path)
    return str(path)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return _weights("sam2.1_hiera_t")


@pytest.fixture(scope="module")
def checkpoint(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save(tmp_path_factory.mktemp("sam2") / "sam2.1_hiera_tiny.pt", weights)


@pytest.fixture(scope="module")
def folder(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same weights as a folder of transformers, of that class's default size."""
    converted = {}
    for name, value in weights.items():
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        converted[name] = value
    with torch.device("meta"):
        model = Sam2HieraDetModel(Sam2HieraDetConfig())
    model.load_state_dict(converted, strict=True, assign=True)
    path = str(tmp_path_factory.mktemp("converted"))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def both(checkpoint: str, folder: str) -> tuple[Teacher, Teacher]:
    """Of the checkpoint and of the folder."""
    return load_teacher("sam2", path=checkpoint), load_teacher("sam2", path=folder)


def _frames(height: int, width: int, clips: int = 1, frames: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    size = (clips, frames, height, width, 3)
    return torch.randint(0, 256, size, generator=rng, dtype=torch.uint8)


@needs_package
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_features_are_those_of_transformers_class(
    both: tuple[Teacher, Teacher], stage: int
) -> None:
    name, stride = f"stage:{stage}", 2 ** (stage + 1)
    frames = _frames(64, 96)
    ours, theirs = (Teacher(teacher._model, "sam2", name) for teacher in both)
    assert (ours.dim, ours.patch_size) == (theirs.dim, theirs.patch_size)
    grid = (64 // stride, 96 // stride)
    found, expected = ours.encode(frames, grid), theirs.encode(frames, grid)
    assert found.grid == expected.grid == (2, *grid)
    assert expected.tokens_BTPD.std() > 0.1
    torch.testing.assert_close(found.tokens_BTPD, expected.tokens_BTPD, rtol=1e-4, atol=1e-4)


@needs_package
def test_sizes_that_are_no_multiples_are_resized_alike(both: tuple[Teacher, Teacher]) -> None:
    for size, grid in (((75, 130), (4, 6)), ((33, 64), (2, 4))):
        frame = _frames(*size, frames=1)
        found, expected = (teacher.encode(frame, grid).tokens_BTPD for teacher in both)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for teacher in both:
        with pytest.raises(UserError, match="multiples of 2, not 3x4"):
            teacher.encode(_frames(48, 64), (3, 4))


@needs_package
def test_the_numbers_of_the_processor_are_the_packages() -> None:
    """Its module of image transforms needs torchvision, so that it is read and not imported."""
    from sam2.utils.misc import load_video_frames

    row = TEACHERS["sam2"]
    defaults = inspect.signature(load_video_frames).parameters
    assert defaults["img_mean"].default == row.mean and defaults["img_std"].default == row.std
    package = importlib.util.find_spec("sam2")
    assert package is not None and package.submodule_search_locations is not None
    source = Path(package.submodule_search_locations[0]) / "utils" / "transforms.py"
    numbers = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    }
    assert tuple(numbers["self.mean"]) == row.mean and tuple(numbers["self.std"]) == row.std
    assert "Resize((self.resolution, self.resolution))" in source.read_text("utf-8")
    assert row.resize == "bilinear"  # torchvision's default


@needs_package
def test_torchvision_is_not_imported(both: tuple[Teacher, Teacher]) -> None:
    both[0].encode(_frames(32, 32), (2, 2))
    assert "torchvision" not in sys.modules


@needs_package
def test_every_released_model_has_a_config() -> None:
    widths = {"t": 96, "s": 96, "b+": 112, "l": 144}
    for file, name in RELEASED.items():
        config = read_config(Path(f"{file}.pt"), None)
        assert config.name == name
        first = widths[name.rsplit("_", 1)[1]]
        assert config.embed_dim_per_stage == (first, 2 * first, 4 * first, 8 * first)


@needs_package
def test_making_a_model_draws_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    model = HieraTrunk(read_config(Path("a.pt"), "sam2.1_hiera_l"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


@needs_package
def test_checkpoints_that_do_not_fit_are_refused_in_one_line(
    checkpoint: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    own = _save(tmp_path / "mine.pt", {name: weights[name] for name in list(weights)[:3]})
    small = _save(tmp_path / "sam2.1_hiera_large.pt", weights)
    other = str(tmp_path / "sam2_hiera_small.pt")
    torch.save({"target_encoder": {}}, other)
    refused: list[tuple[str, str | None, str]] = [
        (own, None, r"mine\.pt holds is not to be told from its name: set teachers\.<alias>\.co"),
        (own, "sam2.1_hiera_x", "config: no sam2.1_hiera_x: choose from sam2.1_hiera_b+"),
        (own, "sam2.1_hiera_t", r"lacks \d+ weights of its model, e\.g\. trunk\."),
        (small, None, r"lacks \d+ weights of its model, e\.g\. trunk\."),
        (other, None, "holds no 'model': no checkpoint of SAM 2"),
    ]
    for path, config, message in refused:
        with pytest.raises(UserError, match=message.replace("b+", r"b\+")) as error:
            load_teacher("sam2", path=path, config=config)
        assert str(error.value).startswith("teachers (sam2)") and "\n" not in str(error.value)
    renamed = shutil.copy(checkpoint, tmp_path / "renamed.pt")
    named = load_teacher(
        "sam2", path=str(renamed), config="configs/sam2.1/sam2.1_hiera_t.yaml", load=False
    )
    assert named.dim == 384


@needs_package
def test_keys_name_the_package(checkpoint: str, folder: str) -> None:
    ours = load_teacher("sam2", path=checkpoint, load=False).parts
    assert "sam2 1.1.0" in str(ours["libraries"]) and "transformers" not in str(ours["libraries"])
    assert "sam2.1_hiera_t" in str(ours["code"])
    assert "code" not in load_teacher("sam2", path=folder, load=False).parts


def test_configs_are_named_as_the_package_or_for_short() -> None:
    for name in ("sam2.1_hiera_b+", "sam2.1_hiera_b+.yaml", "configs/sam2.1/sam2.1_hiera_b+.yaml"):
        assert config_name_of(Path("x.pt"), name) == "sam2.1_hiera_b+"
    assert config_name_of(Path("sam2_hiera_base_plus.pt"), None) == "sam2_hiera_b+"


def test_without_the_package_a_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _save(tmp_path / "sam2.1_hiera_tiny.pt", {"pos_embed": torch.zeros(1)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'alignlab\[sam2\]'"):
        load_teacher("sam2", path=path)


def test_config_is_a_setting_of_sam2_checkpoints_alone(folder_of_dino: str) -> None:
    with pytest.raises(ValueError, match="config: nothing reads it with family: tiny-dino"):
        TeacherConfig.model_validate({"family": "tiny-dino", "config": "sam2.1_hiera_t"})
    values = {"family": "sam2", "path": "x/sam2.1_hiera_tiny.pt", "config": "sam2.1_hiera_t"}
    assert TeacherConfig.model_validate(values).model_dump()["config"] == "sam2.1_hiera_t"
    assert "config" not in TeacherConfig.model_validate({"family": "tiny-dino"}).model_dump()
    with pytest.raises(UserError, match=r"config: sam2\.1_hiera_t: nothing reads it"):
        load_teacher("sam2", path=folder_of_dino, config="sam2.1_hiera_t")


@pytest.fixture
def folder_of_dino(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text('{"model_type": "sam2"}')
    return str(tmp_path)
