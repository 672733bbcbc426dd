"""Signals, sent to this process at chosen moments, with the command line in it."""

import importlib
import json
import logging
import shutil
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import Result

from alignlab import interruption
from alignlab.evaluation import evaluate
from alignlab.train import Trainer
from alignlab.training import stopping
from alignlab.training.batches import Batch
from alignlab.training.optim import averaged_weights
from alignlab.training.setup import Run, build_run
from command_line import alignlab
from run_contents import file_contents, timeless_contents, timeless_metrics, timeless_rows
from small_recipes import comparison_recipe
from tiny_runs import MakeConfig

pytestmark = pytest.mark.usefixtures("shared_clips")

STEPS = 6
SETTINGS = (f"steps={STEPS}", "checkpoint.every=4", "tracking.log_every=4")
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138}


def command(*arguments: object) -> Result:
    """Runs `alignlab` as a process of its own does."""
    with interruption.handled():
        return alignlab(*arguments)


def trained(recipe_file: Path, output: Path, *settings: str) -> Result:
    return command("train", recipe_file, f"output={output}", *SETTINGS, *settings)


def send(name: str) -> None:
    signal.raise_signal(getattr(signal, name))


def send_dropped(name: str) -> None:
    """Sends a signal where Python drops what is raised."""

    class Owner:
        pass

    owner = Owner()
    reference = weakref.ref(owner, lambda _: send(name))
    del owner
    assert reference() is None


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Calls `act` at the end of the step after `step`."""
    take_step = Trainer.step

    def interrupted(trainer: Trainer, batches: list[Batch]) -> Any:
        scalars = take_step(trainer, batches)
        if trainer.state.step == step + 1:
            act()
        return scalars

    patch.setattr(Trainer, "step", interrupted)


def check_same(run: Path, expected: Path) -> None:
    """Weights, optimizer, log and metrics."""
    there, here = timeless_contents(expected), timeless_contents(run)
    names = [name for name in there if name.startswith("checkpoints/step-000006/")]
    assert names
    assert [name for name in names if here[name] != there[name]] == []
    assert timeless_rows(run) == timeless_rows(expected)
    assert timeless_metrics(run) == timeless_metrics(expected)
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (run, expected))
    assert one["aligned"] == two["aligned"]


@pytest.fixture(scope="module")
def uninterrupted(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    assert trained(recipe_file, output).exit_code == 0
    return output / "run"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_warned_run_ends_its_step_and_resumes_to_the_same_bits(
    name: str,
    uninterrupted: Path,
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: send(name))
        result = trained(recipe_file, tmp_path)
    assert result.exit_code == CODES[name]
    assert result.stderr == (
        f"interrupted ({name}) after step 2 of 6 (checkpoint at 2): run the same command again "
        "to resume\n"
    )
    assert trained(recipe_file, tmp_path).exit_code == 0
    check_same(tmp_path / "run", uninterrupted)


def test_ctrl_c_stops_at_once_and_the_run_resumes_to_the_same_bits(
    uninterrupted: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: send("SIGINT"))
        result = trained(recipe_file, tmp_path)
    assert result.exit_code == 130
    assert result.stderr == (
        "interrupted after step 5 of 6 (checkpoint at 4): run the same command again to resume\n"
    )
    assert trained(recipe_file, tmp_path).exit_code == 0
    check_same(tmp_path / "run", uninterrupted)


def test_a_second_sigterm_stops_at_once(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "AGAIN_S", 0.0)
    reached = []

    def twice() -> None:
        send("SIGTERM")
        reached.append("the first one waits")
        send("SIGTERM")
        reached.append("the second one does not")

    at_step(monkeypatch, 1, twice)
    result = trained(recipe_file, tmp_path)
    assert (result.exit_code, reached) == (143, ["the first one waits"])
    assert "after step 2 of 6 (no checkpoint yet)" in result.stderr


def test_one_signal_that_comes_twice_is_one(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a scheduler and from torchrun."""

    def twice() -> None:
        send("SIGTERM")
        send("SIGTERM")

    at_step(monkeypatch, 1, twice)
    assert "(checkpoint at 2)" in trained(recipe_file, tmp_path).stderr


@pytest.mark.parametrize("name", CODES)
def test_a_signal_that_python_drops_stops_a_run(
    name: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 1, lambda: send_dropped(name))
    result = trained(recipe_file, tmp_path, "tracking.log_every=1")
    assert result.exit_code == CODES[name]
    assert "after step 2 of 6" in result.stderr and result.stderr.count("\n") == 1


def test_a_signal_that_python_drops_is_raised_again() -> None:
    """Where no loop looks."""
    with interruption.handled(), pytest.raises(interruption.Interrupted):
        send_dropped("SIGTERM")
        for _ in range(1000):
            signal.sigtimedwait([], 0.01)
        raise AssertionError("dropped")


@pytest.mark.parametrize("name", CODES)
def test_what_may_not_be_left_half_done_is_ended_first(name: str) -> None:
    done = []
    with interruption.handled(), pytest.raises(interruption.Interrupted):
        with interruption.held():
            send(name)
            done.append("all")
        raise AssertionError("not reached")
    assert done == ["all"]


@pytest.mark.parametrize("first", ["SIGTERM", "SIGUSR1"])
def test_ctrl_c_after_a_warning_ends_what_is_held_and_then_the_step(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "AGAIN_S", 0.0)
    done = []
    with interruption.handled(), interruption.deferred():
        send(first)
        with pytest.raises(interruption.Interrupted) as stop:
            with interruption.held():
                with interruption.held():
                    send("SIGINT")
                done.append("all")
            raise AssertionError("not reached")
    assert (stop.value.number, done) == (signal.SIGINT, ["all"])


def test_trained_weights_are_saved_whenever_a_signal_comes(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before their moving average, which was evaluated in their place, could be put away."""
    state = build_run(make_config("optim.ema=0.9")).state
    assert state.ema is not None
    for average in state.ema.values():
        average.add_(1.0)
    state.write_weights(tmp_path / "trained", state.weights())

    def too_early() -> None:
        raise interruption.Interrupted(signal.SIGTERM)

    with pytest.raises(interruption.Interrupted), averaged_weights(state):
        monkeypatch.setattr(interruption, "held", too_early)
    monkeypatch.undo()
    state.write_weights(tmp_path / "saved", state.weights())
    assert file_contents(tmp_path / "saved") == file_contents(tmp_path / "trained")


def test_a_signal_that_is_caught_stops_the_next_loop() -> None:
    """By a library, say."""
    with interruption.handled():
        try:
            send("SIGINT")
        except KeyboardInterrupt:
            pass
        with pytest.raises(interruption.Interrupted):
            interruption.check()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("alignlab.recipe.load_run", ("train", "tiny", "steps=1")),
        ("alignlab.train.build_run", ("train", "tiny", "tracking.mlflow=none")),
        ("alignlab.stage1.train.build_splits", ("stage1", "sara", "stage1_sara")),
        ("alignlab.experiments.compare.run.prepare", ("demo",)),
        ("alignlab.experiments.sweep.run.create_study", ("sweep", "sweep_refalign")),
        ("alignlab.doctor.print_diagnosis", ("doctor",)),
        ("alignlab.experiments.data_preview.build_dataset", ("data", "preview", "tiny")),
        (
            "alignlab.masks.make.read_rows",
            ("data", "masks", "tiny", "data.name=folder", "data.path=."),
        ),
        ("alignlab.experiments.bench.overhead.measure_overhead", ("bench", "overhead")),
        ("alignlab.experiments.bench.kernels.bench_kernels", ("bench", "kernels")),
        ("alignlab.experiments.bench.loss_share.measure_share", ("bench", "share")),
        ("alignlab.evaluation.teacher_score.score_teachers", ("teachers", "score", "tiny")),
        ("alignlab.tiny_models.build.build", ("assets", "build")),
        ("alignlab.data.real_clips.prepare.prepare_real_clips", ("data", "real-clips", "x")),
    ],
)
def test_every_command_ends_with_one_line(
    name: str,
    where: str,
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, function = where.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(module), function, lambda *_, **__: send(name))
    monkeypatch.chdir(tmp_path)
    result = command(*arguments)
    word = "" if name == "SIGINT" else f" ({name})"
    assert result.exit_code == CODES[name]
    assert result.stderr.endswith(f"interrupted{word}: run the same command again\n")
    assert "Traceback" not in result.output


def test_a_library_that_raises_anew_hides_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def within_library(*_: Any) -> None:
        try:
            send("SIGTERM")
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("alignlab.doctor.print_diagnosis", within_library)
    result = command("doctor")
    assert result.exit_code == CODES["SIGTERM"]
    assert result.stderr.endswith("interrupted (SIGTERM): run the same command again\n")


def test_an_interrupted_comparison_names_the_runs_that_are_finished(
    recipe_file: Path,
    teacher_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (teacher / "preprocessor_config.json").write_text("{}")
    text = "\nvariants: {none: {}, ra: {objectives: {ra: {name: refalign, teacher: dino, "
    text += "blocks: [0]}}}}\nbaseline: none\nseeds: [0, 1]\ncost: null\n"
    recipe = comparison_recipe(recipe_file, tmp_path / "pair.yaml", text)
    finish = Trainer.step
    runs: list[str] = []

    def interrupted(trainer: Trainer, batches: list[Batch]) -> Any:
        scalars = finish(trainer, batches)
        runs.append(trainer.config.name)
        if len(set(runs)) == 4:
            send("SIGTERM")
        return scalars

    monkeypatch.setattr(Trainer, "step", interrupted)
    with caplog.at_level(logging.INFO, "alignlab"):
        settings = ("steps=1", f"teachers.dino.path={teacher}", f"output={tmp_path}")
        result = command("compare", recipe, *settings)
    assert result.exit_code == 143
    assert result.stderr.splitlines()[-1] == (
        "interrupted (SIGTERM) after step 1 of 1 (checkpoint at 1), of ra, seed 1, with 3 of 4 "
        "runs finished (none, seed 0; ra, seed 0; none, seed 1): run the same command again to "
        "resume"
    )
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and told[0].startswith("teachers (dinov2): "), "once for four runs"


def test_outside_the_command_line_no_handler_is_put_in_place(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    seen: list[object] = []
    at_step(monkeypatch, 0, lambda: seen.extend(map(signal.getsignal, interruption.SIGNALS)))
    result = alignlab("train", recipe_file, f"output={tmp_path}", "steps=1")
    assert result.exit_code == 0 and seen == before


def test_what_is_ignored_stays_ignored() -> None:
    """As in `nohup`, or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.handled():
            send("SIGINT")
            assert not interruption.asked()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [RecursionError, KeyboardInterrupt, SystemExit])
def test_whatever_a_signal_ends_in_is_one_line(
    error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """An import that was cut short may end in any error."""

    def work() -> None:
        try:
            send("SIGTERM")
        except KeyboardInterrupt:
            raise error from None

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            interruption.run(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code in (130, 143)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_by_the_clock_changes_no_number(
    uninterrupted: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def later() -> None:
        clock[0] += 90.0

    with monkeypatch.context() as patch:
        at_step(patch, 1, later)
        settings = ("checkpoint.every_minutes=1.5", "checkpoint.keep=9")
        assert trained(recipe_file, tmp_path, *settings).exit_code == 0
    run = tmp_path / "run"
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000004", "step-000006"]
    check_same(run, uninterrupted)


@pytest.mark.parametrize("checkpoint_at", [2, 4])
def test_a_warning_within_an_evaluation_keeps_the_trained_weights(
    checkpoint_at: int, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not their moving average, which is evaluated in their place."""
    settings = ("optim.ema=0.9", "eval.every=2")
    assert trained(recipe_file, tmp_path / "whole", *settings).exit_code == 0
    measure = evaluate.validation_flow

    def interrupted(run: Run, *arguments: Any) -> dict[str, float]:
        if run.state.step == checkpoint_at:
            send("SIGTERM")
            raise AssertionError("not reached")
        return measure(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "validation_flow", interrupted)
        result = trained(recipe_file, tmp_path, *settings)
    assert result.exit_code == 143
    assert f"after step {checkpoint_at} of 6 (checkpoint at {checkpoint_at})" in result.stderr
    assert trained(recipe_file, tmp_path, *settings).exit_code == 0
    check_same(tmp_path / "run", tmp_path / "whole" / "run")


def test_a_process_ends_silently_once_its_command_is_over() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        interruption.run(lambda: None)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    assert sys.unraisablehook is not None
