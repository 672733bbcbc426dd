"""Variants that start from another run's weights: what cannot be is seen before anything trains."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, load_compare
from alignlab.experiments.compare.run import join, prepare
from alignlab.experiments.launchers import RunKey
from alignlab.experiments.launchers.ray_cluster import Ended
from alignlab.experiments.launchers.ray_runs import _RayRuns
from alignlab.runs.file_lock import HeldError
from alignlab.runs.input_record import hold_inputs
from alignlab.runs.run_folder import RunFolder
from command_line import refused
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

Make = Callable[..., CompareConfig]

VARIANTS = "cost: null\nbaseline: none\nseeds: [0]\nvariants:\n  none: {}\n  second: {}\n"


@pytest.fixture
def make(recipe_file: Path, tmp_path: Path) -> Make:
    """`make(name, "steps=3")`: the variant `second` starts from that, in folder `runs/pair`."""
    recipe = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)

    def config(named: str, *overrides: str) -> CompareConfig:
        source = f"variants.second.model.init_from={tmp_path}/runs/{named}"
        return load_compare(recipe, [f"output={tmp_path}/runs", source, *overrides])

    return config


def finish(folder: RunFolder, steps: int) -> Path:
    """Makes a folder look as its training would, as far as it is looked at here."""
    checkpoint = folder.checkpoints / f"step-{steps:06d}"
    (checkpoint / "transformer").mkdir(parents=True)
    for name in ("optimizer", "objectives", "transformer/weights"):
        (checkpoint / f"{name}.safetensors").write_text(f"{folder.path} {steps}")
    folder.result.write_text(json.dumps({"steps": steps, "metrics": {}}))
    return checkpoint


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("gone", "no run folder"),
        ("pair/none/seed-1", "no run folder"),  # of a seed that is not among its own
        ("pair/second/seed-0", "no run folder"),
        ("gone/checkpoints/step-000002", "no checkpoint of a run"),
    ],
)
def test_a_source_that_is_not_there_is_refused_before_anything_is_made(
    make: Make, tmp_path: Path, named: str, message: str
) -> None:
    with pytest.raises(UserError, match=rf"model\.init_from: .*{named}: {message}"):
        prepare(make(named))
    assert not (tmp_path / "runs").exists()


def test_a_source_of_other_weights_is_refused(make: Make) -> None:
    lora = [f"variants.second.model.{one}" for one in ("train=lora", "lora.rank=4", "lora.alpha=8")]
    with pytest.raises(UserError, match="trained all weights, this run trains a LoRA"):
        prepare(make("pair/none/seed-0", *lora))


def test_a_variant_may_start_from_a_run_before_it_which_is_not_prolonged(
    make: Make, tmp_path: Path
) -> None:
    plan = prepare(make("pair/none/seed-0"))
    checkpoint = finish(plan.folders["none", 0], 2)
    prepare(make("pair/none/seed-0"))
    hold_inputs(plan.folders["second", 0], plan.runs["second", 0])  # as its training would
    finish(plan.folders["second", 0], 2)
    before = (plan.folders["second", 0].path / "inputs.json").read_bytes()
    assert b"step-000002" in before
    prepare(make("pair/none/seed-0", "seeds=[0, 1]"))
    with pytest.raises(UserError) as error:
        prepare(make("pair/none/seed-0", "steps=3"))
    assert "which steps=3 would prolong, so that they are others: give steps=2" in str(error.value)
    assert str(error.value).endswith(f"let it start from {checkpoint}")
    renamed = make(f"pair/none/seed-0/checkpoints/{checkpoint.name}", "steps=3", "name=longer")
    prepare(renamed)  # as the line says
    prepare(make("pair/none/seed-0"))  # and nothing has become of this one
    assert (plan.folders["second", 0].path / "inputs.json").read_bytes() == before


def test_a_source_elsewhere_may_be_prolonged_and_is_told_from_one_that_changed(
    make: Make, tmp_path: Path
) -> None:
    """Where its checkpoint is still there; one that went away is as a run that did."""
    source = RunFolder(tmp_path / "runs" / "first")
    source.path.mkdir(parents=True)
    source.write_recipe(make("first").run("none", 0))
    first = finish(source, 2)
    plan = prepare(make("first"))
    finish(plan.folders["second", 0], 2)
    finish(plan.folders["none", 0], 2)
    later = finish(source, 3)
    prepare(make("first"))
    with pytest.raises(UserError, match=r"read different model\.init_from"):  # from step 3
        prepare(make("first", "seeds=[0, 1]"))
    (first / "objectives.safetensors").write_text("other")
    with pytest.raises(UserError, match=r"model\.init_from changed since this run began"):
        prepare(make("first"))
    first.rename(tmp_path / "pruned")
    prepare(make("first"))
    later.rename(tmp_path / "all")  # what is left is older than what it started from
    with pytest.raises(UserError, match=r"model\.init_from changed since this run began"):
        finish(source, 1)
        prepare(make("first"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ("model.path=/gone/wan", "model.path: /gone/wan: no such folder"),
        (
            "teachers.dino.path=/gone/dino",
            "teachers (dinov2) path: /gone/dino: no such folder",
        ),
        (
            "objectives.mo={name: moalign, teacher: dino, blocks: [1], head: /gone/head}",
            "objectives.mo.head: /gone/head",
        ),
    ],
)
def test_a_folder_of_a_later_variant_that_is_gone_is_told_before_the_first_trains(
    make: Make, recipe_file: Path, tmp_path: Path, changes: str, named: str
) -> None:
    recipe = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)
    allowed = "allow_differences=[teachers.dino.path]" if "dino.path" in changes else "seeds=[0]"
    variant = f"variants.second.{changes}"
    line = refused("compare", recipe, f"output={tmp_path}/runs", variant, allowed)
    assert line.startswith(f"error: variant second: {named}")
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_run_that_another_process_still_trains_is_waited_for_by_what_starts_from_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = list[str]()

    def train_one(run: RunConfig, caches: object, needs: object, *, wait: bool) -> None:
        _, variant, _ = run.name.split("/")
        trained.append(variant)
        if trained.count("none") == 1:
            raise HeldError("another process trains it")
        finish(RunFolder(Path(run.output) / run.name), run.steps)

    monkeypatch.setattr("alignlab.experiments.compare.run.train_one", train_one)
    monkeypatch.setattr("alignlab.experiments.compare.run.LOOK_EVERY_S", 0.0)
    join(make("pair/none/seed-0"))
    assert trained == ["none", "none", "second"]


class EndingTasks:
    """Stands for the tasks of a cluster: the one that was started last ends first."""

    threads = ranks = 1

    def __init__(self) -> None:
        self.started: list[RunKey] = []
        self.running: list[RunKey] = []
        self.folders: dict[RunKey, RunFolder] = {}

    def start(self, key: RunKey, order: object) -> None:
        self.started.append(key)
        self.running.append(key)

    def ended(self, seconds: float) -> Iterator[Ended[RunKey]]:
        key = self.running.pop()
        finish(self.folders[key], 2)
        yield Ended(key, None, None)

    def warn_without_room(self) -> None:
        pass

    def cancel(self) -> None:
        pass


def test_on_ray_a_run_is_sent_when_what_it_starts_from_is_finished(make: Make) -> None:
    plan = prepare(make("pair/none/seed-0", "seeds=[0, 1]"))
    tasks, finished = EndingTasks(), list[RunKey]()
    tasks.folders = plan.folders
    _RayRuns(tasks, plan.runs).watch(finished.append)  # type: ignore[arg-type]
    assert tasks.started == [("none", 0), ("none", 1), ("second", 0), ("second", 1)]
    assert sorted(finished) == sorted(plan.runs)
