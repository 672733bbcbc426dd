"""Damaged studies: refused by name, or said; nothing begins anew in silence."""

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments.sweep.config import SweepConfig, load_sweep
from alignlab.experiments.sweep.study import create_study, join_study
from damage import KINDS, cut, delete, empty, flip
from small_recipes import sweep_recipe

Damage = Callable[[Path], None]
SWEEP = """
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
metric: val/flow
trials: 3
"""


@pytest.fixture
def make(recipe_file: Path, tmp_path: Path) -> Callable[..., SweepConfig]:
    recipe = sweep_recipe(recipe_file, tmp_path / "sweep.yaml", SWEEP)
    return lambda *overrides: load_sweep(recipe, [f"output={tmp_path}", *overrides])


def begun(config: SweepConfig, tmp_path: Path) -> None:
    """A study of which a trial has left its folder."""
    create_study(config)
    (tmp_path / "sweep" / "trial-0000").mkdir()


@pytest.mark.parametrize("storage", ["study.db", "study.log"])
@pytest.mark.parametrize(
    "damage", [k for k in KINDS if k not in (delete, flip)], ids=lambda k: k.__name__
)
def test_a_damaged_study_is_refused_by_name(
    make: Callable[..., SweepConfig], tmp_path: Path, storage: str, damage: Damage
) -> None:
    path = tmp_path / "sweep" / storage
    config = make() if storage == "study.db" else make(f"storage={path}")
    begun(config, tmp_path)
    damage(path)
    for open_study in (create_study, join_study):
        with pytest.raises(UserError, match=rf"{storage} is damaged \(.+\): copy it back") as e:
            open_study(config)
        assert "\n" not in str(e.value)


def test_a_study_that_is_gone_while_its_trials_lie_there_is_told(
    make: Callable[..., SweepConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    begun(make(), tmp_path)
    assert caplog.text == ""
    delete(tmp_path / "sweep" / "study.db")
    create_study(make())
    assert "the study is new, though 1 trials lie there, such as trial-0000" in caplog.text


def test_what_a_kill_leaves_before_the_first_trial_is_no_damage(
    make: Callable[..., SweepConfig], tmp_path: Path
) -> None:
    (tmp_path / "sweep").mkdir()
    for damage in (Path.touch, empty):
        damage(tmp_path / "sweep" / "study.db")
        assert len(create_study(make()).trials()) == 3


def test_a_journal_whose_last_record_was_cut_off(
    make: Callable[..., SweepConfig], tmp_path: Path
) -> None:
    path = tmp_path / "study.journal"
    create_study(make(f"storage={path}"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"study\.journal is damaged \(line \d+ is cut\)") as caught:
        create_study(make(f"storage={path}"))
    command = str(caught.value).rsplit(": ", 1)[1]
    kept = path.read_bytes()
    subprocess.run(shlex.split(command), check=True)
    assert len(create_study(make(f"storage={path}")).trials()) == 3
    path.write_bytes(kept)
    cut(path)
    with pytest.raises(UserError, match=r"study\.journal is damaged"):
        create_study(make(f"storage={path}"))
