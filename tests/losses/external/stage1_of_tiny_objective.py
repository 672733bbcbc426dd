"""The package's own test: its Stage 1 network is saved and read like alignlab's own."""

from pathlib import Path

import pytest
import torch
from tiny_objective import ChannelGain, UnitDistance  # type: ignore[import-not-found]

from alignlab.losses.registry import OBJECTIVES, STAGE1, build_objective
from alignlab.losses.stage1.folder import (
    Stage1Info,
    Stage1Teacher,
    load_stage1,
    read_stage1_info,
    save_stage1,
)


def test_it_comes_after_the_built_in_ones() -> None:
    assert list(STAGE1) == ["sara", "moalign", "unit_distance"]
    assert OBJECTIVES["unit_distance"] is UnitDistance


def test_a_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    row = STAGE1["unit_distance"]
    config = row.config(teacher_dim=5)
    info = Stage1Info(
        kind="unit_distance",
        teacher=Stage1Teacher(family="dinov2", path="x", feature="post_norm"),
        teacher_dim=5,
        grid=(2, 3),
        module=config,
    )
    network = row.network(config, seed=4)
    save_stage1(tmp_path, network, info)
    assert read_stage1_info(tmp_path, "unit_distance") == info
    loaded, _ = load_stage1(tmp_path, "unit_distance")
    assert type(loaded) is ChannelGain and not loaded.gain_D.requires_grad
    assert torch.equal(loaded.gain_D, network.get_parameter("gain_D"))

    objective_config = UnitDistance.Config(teacher="dino", **{row.setting: str(tmp_path)})
    build_objective(objective_config, student_dim=4, teacher_dims={"dino": 5})
    with pytest.raises(ValueError, match=r"reads teacher tokens of width 5, dino has 7$"):
        build_objective(objective_config, student_dim=4, teacher_dims={"dino": 7})
