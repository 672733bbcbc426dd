"""Damaged files of real runs: refused in one line or told, and never used in silence."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.evaluation.blocks import measure_blocks
from alignlab.recipe import load_run
from alignlab.runs.checksums import write_json
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.prolong import begin_leg
from alignlab.runs.run_folder import RunFolder
from alignlab.runs.verify import verify_run
from alignlab.sampling import load_trained
from alignlab.train import Trainer, train
from alignlab.training.batches import Batch
from command_line import alignlab
from damage import KINDS, a_list, cut, delete, empty, flip, garbage
from kills import Killed
from run_contents import file_contents, timeless_metrics, timeless_rows

pytestmark = pytest.mark.usefixtures("shared_clips")

Damage = Callable[[Path], None]
SETTINGS = ("steps=5", "checkpoint.every=2", "checkpoint.keep=2", "eval.clips=1")


@pytest.fixture(scope="module")
def outputs(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole/run` of five steps, and `stopped/run`, killed after the fourth."""
    folder = tmp_path_factory.mktemp("damaged")
    train(load_run(recipe_file, [f"output={folder / 'whole'}", *SETTINGS]))
    take_step = Trainer.step

    def dying(trainer: Trainer, batches: list[Batch]) -> object:
        if trainer.state.step == 4:
            raise Killed
        return take_step(trainer, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step", dying)
        train(load_run(recipe_file, [f"output={folder / 'stopped'}", *SETTINGS]))
    return folder


@pytest.fixture
def stopped(outputs: Path, tmp_path: Path) -> Path:
    """A copy of the killed run, in a folder of its own."""
    return Path(shutil.copytree(outputs / "stopped", tmp_path / "o")) / "run"


@pytest.fixture
def resume(recipe_file: Path, stopped: Path) -> Callable[..., Path]:
    """Gives the same command again."""
    return lambda *more: train(
        load_run(recipe_file, [f"output={stopped.parent}", *SETTINGS, *more])
    )


def test_a_flipped_bit_in_the_optimizer_costs_two_steps_and_no_bit(
    outputs: Path, stopped: Path, resume: Callable[[], Path], caplog: pytest.LogCaptureFixture
) -> None:
    flip(stopped / "checkpoints" / "step-000004" / "optimizer.safetensors")
    (stopped / "checkpoints" / "step-best").mkdir()
    resume()
    assert "step-000004 is damaged (optimizer.safetensors: its checksum is another)" in caplog.text
    whole = outputs / "whole" / "run"
    assert timeless_metrics(stopped) == timeless_metrics(whole)
    assert timeless_rows(stopped) == timeless_rows(whole)
    weights = "checkpoints/step-000005/transformer/diffusion_pytorch_model.safetensors"
    assert file_contents(stopped)[weights] == file_contents(whole)[weights]
    result = RunFolder(stopped).read_result()
    assert result is not None
    note = "the checkpoint step-000004 was damaged: an older one was resumed"
    assert note in result["notes"]
    assert verify_run(stopped).damaged == {}


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("recipe.yaml", flip, r"recipe\.yaml is damaged \(its checksum is another"),
        ("recipe.yaml", cut, r"recipe\.yaml is damaged \(its checksum is another"),
        ("recipe.yaml", empty, r"recipe\.yaml is damaged"),
        ("recipe.yaml", garbage, r"recipe\.yaml is damaged"),
        ("recipe.yaml", a_list, r"recipe\.yaml is damaged"),
        ("inputs.json", flip, r"inputs\.json is damaged"),
        ("metrics.jsonl", flip, r"metrics\.jsonl is damaged \(its first \d rows were changed"),
        ("metrics.jsonl", cut, r"metrics\.jsonl is damaged \(it has \d+ of the \d+ bytes"),
        ("metrics.jsonl", empty, r"metrics\.jsonl is damaged \(it has 0 of the"),
    ],
)
def test_what_a_resume_reads_is_refused_in_one_line(
    stopped: Path, resume: Callable[[], Path], file: str, damage: Damage, named: str
) -> None:
    damage(stopped / file)
    with pytest.raises(UserError, match=named) as caught:
        resume()
    assert "\n" not in str(caught.value)
    assert stopped / file in verify_run(stopped).damaged


def test_a_recipe_of_other_settings_is_still_another_recipe(resume: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"holds a run of another recipe \(optim\.lr was"):
        resume("optim.lr=0.5")


def test_lost_files_are_told_and_noted(
    stopped: Path, resume: Callable[[], Path], caplog: pytest.LogCaptureFixture
) -> None:
    delete(stopped / "metrics.jsonl")
    delete(stopped / "recipe.yaml")
    garbage(stopped / "environment.json")
    resume()
    assert "its recipe.yaml is gone" in caplog.text
    assert "environment.json (no JSON" in caplog.text
    environment = json.loads((stopped / "environment.json").read_text())
    assert environment["threads"].startswith("unknown, then ")
    assert [row["step"] for row in read_rows(stopped / "metrics.jsonl")] == [5, 5]
    result = RunFolder(stopped).read_result()
    assert result is not None
    assert "metrics.jsonl was gone at a resume: its first 5 rows are lost" in result["notes"]


def test_broken_rows_after_the_checkpoint_are_written_again(
    outputs: Path, stopped: Path, resume: Callable[[], Path]
) -> None:
    with (stopped / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 40 + b'\n{"step": 5, "ti\n{"step": 5}\n[]\n')
    resume()
    assert timeless_rows(stopped) == timeless_rows(outputs / "whole" / "run")


@pytest.fixture
def finished(full_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full_run, tmp_path / "run"))


def test_a_log_that_is_lost_after_the_last_step_costs_its_costs(finished: Path) -> None:
    """The run is evaluated again; what its steps cost is not known any more."""
    metrics = timeless_metrics(finished)
    delete(finished / "metrics.jsonl")
    delete(finished / "result.json")
    train(load_run(finished / "recipe.yaml", [f"output={finished.parent}"], stored=True))
    result = RunFolder(finished).read_result()
    assert result is not None and "time/step" not in result["metrics"]
    assert timeless_metrics(finished) == metrics


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("all", "result.json: the same command then evaluates the run again from its last"),
        ("weights", ": the same command then trains the run again, from its first step"),
        ("none", "result.json: the same command then trains the run again, from its first step"),
    ],
)
def test_what_is_said_of_a_damaged_result_is_what_happens(
    keep: str, said: str, finished: Path
) -> None:
    """The line says what to remove; the same command then ends the run as before."""
    settings = [f"output={finished.parent}", f"checkpoint.keep_finished={keep}"]
    config = load_run(finished / "recipe.yaml", settings, stored=True)
    metrics = timeless_metrics(train(config))
    garbage(finished / "result.json")
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        train(config)
    removed = Path(str(caught.value).split("or remove ")[1].split(": the same")[0])
    assert removed in (finished, finished / "result.json")
    shutil.rmtree(removed) if removed == finished else removed.unlink()
    steps: list[int] = []
    take_step = Trainer.step

    def counted(trainer: Trainer, batches: list[Batch]) -> object:
        steps.append(trainer.state.step)
        return take_step(trainer, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", counted)
        assert timeless_metrics(train(config)) == metrics
    assert steps == ([] if keep == "all" else [0, 1])
    assert verify_run(finished).damaged == {}


def test_the_result_of_earlier_steps_is_not_removed_alone(finished: Path) -> None:
    """The result of all steps has its checksum."""
    folder = RunFolder(finished)
    result = folder.read_result()
    assert result is not None
    write_json(finished / "result-000001.json", result)
    folder.write_result(result)
    garbage(finished / "result-000001.json")
    (line,) = verify_run(finished).damaged.values()
    assert "or remove it and, if there is one, result.json" in line


def test_a_finished_run_keeps_the_recipe_that_it_was_trained_with(finished: Path) -> None:
    recipe = (finished / "recipe.yaml").read_bytes()
    settings = [f"output={finished.parent}", "eval.every=1"]
    train(load_run(finished / "recipe.yaml", settings, stored=True))
    assert (finished / "recipe.yaml").read_bytes() == recipe


def test_a_schedule_that_is_resumed_and_not_there_is_told(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["steps=3", "optim.resume_schedule=keep"]
    config = load_run(finished / "recipe.yaml", settings, stored=True)
    plan = begin_leg(RunFolder(finished), config, 2)
    assert plan.was_prolonged
    assert "optim.resume_schedule: keep: it changes nothing" in caplog.text


def test_other_blocks_are_measured_on_a_whole_checkpoint(finished: Path) -> None:
    folder = RunFolder(finished)
    before = folder.read_result()
    (weights,) = (finished / "checkpoints" / "step-000002" / "transformer").glob("*.safetensors")
    flip(weights)
    config = folder.config()
    blocks = config.eval.model_copy(update={"blocks": (0, 1, 2)})
    with pytest.raises(UserError, match=r"step-000002 is damaged \(transformer/.+\)"):
        measure_blocks(folder, config.model_copy(update={"eval": blocks}))
    assert folder.read_result() == before


def test_a_run_that_has_lost_the_record_of_its_code_is_noted(stopped: Path) -> None:
    assert not any("code.json" in note for note in verify_run(stopped).unknown)
    (stopped / "code.json").unlink()
    assert any("code.json is missing" in note for note in verify_run(stopped).unknown)


@pytest.mark.parametrize("damage", KINDS, ids=lambda k: k.__name__)
def test_every_file_of_a_finished_run_is_verified(finished: Path, damage: Damage) -> None:
    whole = verify_run(finished)
    assert whole.damaged == {} and whole.unknown == []
    files = {p for p in finished.rglob("*") if p.is_file() and not p.name.startswith(".writer")}
    assert whole.files == files
    for path in sorted(files):
        kept = path.read_bytes()
        if not kept:  # such as the changes of a checkout without any: it would be the same
            continue
        damage(path)
        found = verify_run(finished)
        if damage is delete and path.name in ("result.json", "checksums.json"):
            # as a run that is not finished, or an older version, leaves it
            assert found.unknown
        else:
            assert found.damaged.keys() & {path, finished / "checkpoints" / "step-000002"}, path
        if path.is_dir():
            path.rmdir()
        path.write_bytes(kept)


@pytest.mark.parametrize("file", ["result.json", "metrics.jsonl", "environment.json"])
def test_a_finished_run_with_a_damaged_file_is_not_taken_as_it_is(
    recipe_file: Path, finished: Path, file: str
) -> None:
    flip(finished / file)
    result = alignlab("train", recipe_file, f"output={finished.parent}")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"{file} is damaged (" in result.stderr


def test_the_command_says_what_is_damaged(finished: Path) -> None:
    result = alignlab("verify", finished)
    assert result.exit_code == 0 and result.stdout.endswith("files, all whole\n"), result.stdout
    flip(finished / "checkpoints" / "step-000002" / "state.json")
    result = alignlab("verify", finished)
    assert result.exit_code == 1
    line, summary = result.stdout.splitlines()
    assert "step-000002 is damaged (state.json: its checksum is another): " in line
    assert summary.endswith(" files, 1 damaged")
    assert alignlab("verify", finished.parent / "nothing").exit_code == 2


def test_a_model_is_not_loaded_from_damaged_weights(finished: Path) -> None:
    flip(
        finished / "checkpoints/step-000002/transformer/diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(UserError, match=r"step-000002 is damaged \(transformer/diffusion"):
        load_trained(finished)


def test_a_result_of_an_older_version_is_read(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    older = {key: value for key, value in result.items() if key not in ("checksum", "files")}
    (finished / "result.json").write_text(json.dumps(older))
    assert RunFolder(finished).read_result() == older
    found = verify_run(finished)
    assert found.damaged == {}
    assert found.unknown == [f"{finished}: finished before checksums were kept"]


def test_a_result_that_names_no_steps_is_none_of_a_training(
    finished: Path, recipe_file: Path
) -> None:
    """Such as that of an evaluation: else the run would be finished at any number of steps."""
    write_json(finished / "result.json", {"step": 2, "metrics": {"val/flow": 0.5}})
    for steps in (2, 9):
        with pytest.raises(UserError, match=r"result\.json is damaged \(it has no steps\)"):
            train(load_run(recipe_file, [f"output={finished.parent}", f"steps={steps}"]))
    assert finished / "result.json" in verify_run(finished).damaged


def test_what_to_do_about_a_checkpoint_depends_on_the_others(stopped: Path) -> None:
    older, newer = (stopped / "checkpoints" / f"step-{step:06d}" for step in (2, 4))

    def fixes() -> list[str]:
        damaged = verify_run(stopped).damaged
        return [damaged[path].split("): ", 1)[1] for path in (older, newer) if path in damaged]

    state = (older / "state.json").read_bytes()
    flip(older / "state.json")
    assert fixes()[0].startswith("step-000004 is newer and whole: remove this one")
    flip(newer / "state.json")
    again = f"copy it back from elsewhere, or remove {stopped} to train from the start"
    assert fixes() == [again, again]
    (older / "state.json").write_bytes(state)
    assert fixes() == ["the older one is resumed in its place, or copy it back from elsewhere"]
