"""What is looked at before the first step, and by which rank."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignlab.config.run import RunConfig
from alignlab.distributed.ranks import Ranks
from alignlab.errors import UserError
from alignlab.training.setup import build_run, check_teachers_and_eval

MakeConfig = Callable[..., RunConfig]


class OtherRank(Ranks):
    """One that is not the main one: what that does is not done here."""

    def on_main(self, work: object, *args: object, **settings: object) -> None:  # type: ignore[override]
        self.left_to_main = args


def test_the_main_rank_alone_reads_a_teacher_that_is_measured_against(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    missing = f"teachers.other={{family: dinov2, path: {tmp_path / 'none'}}}"
    run = build_run(make_config(missing, "eval.teacher=other"))
    with pytest.raises(UserError, match="none"):
        check_teachers_and_eval(run)
    run.ranks = other = OtherRank(torch.device("cpu"), "fp32")
    check_teachers_and_eval(run)
    assert other.left_to_main == (run, "other")


def test_zeros_in_place_of_references_need_a_position(make_config: MakeConfig) -> None:
    frames = ["data.frames=125", "data.size=[32,32]", "data.train_clips=2", "data.val_clips=2"]
    bare = [*frames, "data.references=[0,0]"]  # 32 latent frames, 32 positions
    build_run(make_config(*bare, aligned=False))
    with pytest.raises(UserError, match=r"data\.references: 33 positions, this transformer has 32"):
        build_run(make_config(*bare, "model.absent_references=zero", aligned=False))
