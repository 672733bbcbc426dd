"""Damages every file that alignlab keeps in six ways, and gives the commands that read it.

    PYTHONPATH=.:tests/helpers python tests/campaigns/damaged_files.py [SCENE...] [--list]

Run by hand: it takes minutes. Scenes: run (interrupted), finished, stage1, comparison, sweep,
models. Each file is emptied, cut, has one bit flipped, is filled with garbage, removed, or a folder
takes its place; each command works on a copy of its own. What may come of it:

refused    exit code 1 or 2 and one line
told       exit code 0 and a line that the whole folder does not give
same       exit code 0 and the result of the whole folder
TRACEBACK  an error that nobody made a line of, or more than one line
SILENT     exit code 0, another result, and no line
MISSED     `alignlab verify` says that all is whole

Exits 1 if there is one of the last three.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.progress import warn_once
from alignlab.recipe import load_run, load_stage1_run
from alignlab.stage1.train import train_stage1
from alignlab.train import Trainer, train
from alignlab.training.step_terms import StepScalars
from damage import KINDS, a_list, cut, delete, empty, folder, garbage, pointer
from kills import Killed
from run_contents import read_table, timeless_metrics, timeless_rows
from small_recipes import comparison_recipe, sweep_recipe
from tiny_runs import RECIPE, write_teacher
from tiny_wan import write_wan

BAD = ("TRACEBACK", "SILENT", "MISSED")
IGNORED = (".writer", ".writer.lock", ".lock", ".db.lock", ".log")
"""Ends of the names of files that hold nothing of a result."""


@dataclass(frozen=True)
class Command:
    """A command and its result.

    Args:
        arguments: of `alignlab`, for a copy of the scene.
        result: what it leaves, comparable; None for `verify`.
    """

    arguments: Callable[[Path], list[str]]
    result: Callable[[Path], object] | None


@dataclass(frozen=True)
class Scene:
    """A folder, the part of it that is damaged, and the commands that read that.

    Args:
        root: is copied for each case.
        damaged: the part, relative to the root.
        commands: by name.
        kinds: of damage besides the six.
        leave_out: whether a file is not damaged.
    """

    root: Path
    damaged: str
    commands: Mapping[str, Command]
    kinds: tuple[Callable[[Path], None], ...] = KINDS
    leave_out: Callable[[str], bool] = lambda name: False

    def files(self) -> list[str]:
        """Names of the files to damage, relative to the root."""
        found = (p.relative_to(self.root) for p in (self.root / self.damaged).rglob("*"))
        return sorted(
            name.as_posix()
            for name in found
            if (self.root / name).is_file()
            and (self.root / name).stat().st_size  # emptied, cut or flipped it would be the same
            and not name.name.endswith(IGNORED)
            and not self.leave_out(name.as_posix())
        )


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Args:
        code: its exit code; None for a traceback.
        lines: warnings and errors, with the copy's path left out.
        result: see `Command`.
    """

    code: int | None
    lines: tuple[str, ...]
    result: object


class Collector(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def warnings_kept() -> Iterator[Collector]:
    collector, log = Collector(), logging.getLogger("alignlab")
    log.addHandler(collector)
    try:
        yield collector
    finally:
        log.removeHandler(collector)


def outcome(command: Command, root: Path) -> Outcome:
    warn_once.cache_clear()
    with warnings_kept() as collector:
        done = CliRunner().invoke(app, command.arguments(root), env={"COLUMNS": "300"})
    error = done.exception
    if error is not None and not isinstance(error, SystemExit):
        text = "".join(traceback.format_exception(error)[-2:])
        return Outcome(None, (text,), None)
    lines = [*collector.lines, *done.stderr.splitlines()]
    result = None
    if command.result is None:
        lines += [line for line in done.stdout.splitlines() if "damaged" in line or "note" in line]
    elif done.exit_code == 0:
        result = command.result(root)
    return Outcome(done.exit_code, tuple(line.replace(str(root), "ROOT") for line in lines), result)


def judged(command: Command, whole: Outcome, found: Outcome) -> str:
    new = [line for line in found.lines if line not in whole.lines]
    if found.code is None:
        return "TRACEBACK"
    if command.result is None:
        return "refused" if found.code else "told" if new else "MISSED"
    if found.code:
        errors = [line for line in found.lines if line.startswith("error")]
        return "refused" if len(errors) == 1 else "TRACEBACK"
    if new:
        return "told"
    return "same" if found.result == whole.result else "SILENT"


def play(name: str, scene: Scene, work: Path, shown: bool) -> list[tuple[str, str]]:
    """Every file, kind and command of a scene; gives command and verdict of each."""
    verdicts = []
    whole = {}
    for command_name, command in scene.commands.items():
        copy = fresh(scene, work)
        whole[command_name] = outcome(command, copy)
        assert whole[command_name].code == 0, whole[command_name]
    for file in scene.files():
        for kind in scene.kinds:
            for command_name, command in scene.commands.items():
                copy = fresh(scene, work)
                kind(copy / file)
                found = outcome(command, copy)
                verdict = judged(command, whole[command_name], found)
                verdicts.append((command_name, verdict))
                if shown or verdict in BAD:
                    new = [line for line in found.lines if line not in whole[command_name].lines]
                    print(f"{verdict:9} {name} {file} {kind.__name__} {command_name}", *new[:2])
    return verdicts


def fresh(scene: Scene, work: Path) -> Path:
    shutil.rmtree(work, ignore_errors=True)
    return Path(shutil.copytree(scene.root, work))


def weights(run: Path) -> dict[str, bytes]:
    """The trained weights of the last checkpoint."""
    newest = max(run.glob("checkpoints/step-??????"))
    return {p.name: p.read_bytes() for p in newest.rglob("*.safetensors")}


def trained(run: Path) -> object:
    return weights(run), timeless_metrics(run), timeless_rows(run)


def stopped_at(step: int, work: Callable[[], object]) -> None:
    """Does `work`, and dies as if killed before a step."""
    take_step = Trainer.step

    def dying(trainer: Trainer, batches: object) -> StepScalars:
        if trainer.state.step == step:
            raise Killed
        return take_step(trainer, batches)  # type: ignore[arg-type]

    Trainer.step = dying  # type: ignore[method-assign, assignment]
    with suppress(Killed):
        work()
    Trainer.step = take_step  # type: ignore[method-assign]


VERIFY = "verify"


class Scenes:
    """Makes what is damaged.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.wan, self.teacher = write_wan(root / "wan"), write_teacher(root / "teacher")
        text = RECIPE.format(wan=self.wan, teacher=self.teacher)
        text = text.replace("clips: 2, batch_size", "clips: 1, batch_size")
        self.recipe = root / "run.yaml"
        self.recipe.write_text(text.replace("batch_size: 2}", "batch_size: 2, ema: 0.9}"))

    def reading(self, run: str) -> dict[str, Command]:
        """Commands that look at a run."""
        prompt = ["--prompt", "a red circle", "--steps", "1"]
        return {
            "sample": Command(
                lambda root: ["sample", str(root / run), *prompt, "--out", str(root / "o.mp4")],
                lambda root: (root / "o.mp4").read_bytes(),
            ),
            VERIFY: Command(lambda root: ["verify", str(root / run)], None),
        }

    def run(self) -> Scene:
        """An interrupted run with two checkpoints."""
        output = self.root / "interrupted"
        settings = ["steps=6", "checkpoint.every=2", "checkpoint.keep=2"]
        config = load_run(self.recipe, [f"output={output}", *settings])
        stopped_at(5, lambda: train(config))
        resume = Command(
            lambda root: ["train", str(self.recipe), f"output={root}", *settings],
            lambda root: trained(root / "run"),
        )
        return Scene(output, "run", {"train": resume, **self.reading("run")})

    def finished(self) -> Scene:
        """A finished run with a sample."""
        output = self.root / "finished"
        settings = ["eval.sample_clips=1"]
        train(load_run(self.recipe, [f"output={output}", *settings]))
        again = Command(
            lambda root: ["train", str(self.recipe), f"output={root}", *settings],
            lambda root: (timeless_metrics(root / "run"), timeless_rows(root / "run")),
        )
        export = Command(
            lambda root: ["export", str(root / "run")],
            lambda root: [p.read_bytes() for p in sorted(root.rglob("export/**/*.safetensors"))],
        )
        return Scene(output, "run", {"train": again, "export": export, **self.reading("run")})

    def stage1(self) -> Scene:
        """A Stage 1 training, and a Stage 2 run that reads its network."""
        output, recipe = self.root / "stage1", self.root / "stage1.yaml"
        shared = self.recipe.read_text().split("objectives:")[0].replace("name: run", "name: first")
        shared = shared.replace(f"model: {{path: {self.wan}}}\n", "")
        recipe.write_text(
            f"{shared}stage1: {{kind: moalign, width: 8, hidden: 8, decoder: 8, val_clips: 1}}\n"
            "tracking: {mlflow: none, log_every: 1}\noptim: {lr: 1e-3, batch_size: 2}\n"
        )
        train_stage1(load_stage1_run("moalign", recipe, [f"output={output}"]))
        again = Command(
            lambda root: ["stage1", "moalign", str(recipe), f"output={root}"],
            lambda root: {p.name: p.read_bytes() for p in root.glob("first/stage1/*")},
        )

        def second(root: Path) -> list[str]:
            row = f"{{name: moalign, teacher: dino, blocks: [1], head: {root}/first/stage1}}"
            return ["train", str(self.recipe), f"output={root}", f"objectives={{mo: {row}}}"]

        read = Command(second, lambda root: trained(root / "run"))
        check = Command(lambda root: ["verify", str(root / "first")], None)
        return Scene(output, "first", {"stage1": again, "train": read, VERIFY: check})

    def comparison(self) -> Scene:
        """A comparison of two variants, whose runs are damaged in a few files only."""
        output = self.root / "comparison"
        variants = (
            "cost: null\nbaseline: none\nseeds: [0]\nvariants:\n  none: {}\n  aligned:\n"
            "    objectives.ra: {name: refalign, teacher: dino, blocks: [0]}\n"
        )
        recipe = comparison_recipe(self.recipe, self.root / "pair.yaml", variants)
        recipe.write_text(recipe.read_text().replace("sample_clips: 0", "sample_clips: 1"))

        def arguments(root: Path) -> list[str]:
            return ["compare", str(recipe), f"output={root}"]

        done = CliRunner().invoke(app, arguments(output))
        assert done.exit_code == 0, (done.output, done.exception)

        def numbers(root: Path) -> object:
            rows = read_table(root / "pair" / "table.csv")
            kept = [row for row in rows if not str(row).count("time/") + str(row).count("memory/")]
            page = json.loads((root / "pair" / "comparison.json").read_text())
            return kept, [run["samples"] for run in page["results"]]

        commands = {
            "compare": Command(arguments, numbers),
            VERIFY: Command(lambda root: ["verify", str(root / "pair")], None),
        }
        return Scene(output, "pair", commands, leave_out=lambda name: "/none/" in name)

    def sweep(self) -> Scene:
        """A sweep of two trials; their runs are left alone."""
        output = self.root / "sweep"
        space = (
            "space:\n  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}\n"
            "metric: val/flow\ntrials: 2\n"
        )
        recipe = sweep_recipe(self.recipe, self.root / "sweep.yaml", space)
        pair = comparison_recipe(
            self.recipe,
            self.root / "tuned.yaml",
            "cost: null\nbaseline: none\nseeds: [0]\nvariants:\n  none: {}\n",
        )

        def arguments(root: Path) -> list[str]:
            return ["sweep", str(recipe), f"output={root}"]

        done = CliRunner().invoke(app, arguments(output))
        assert done.exit_code == 0, done.output

        def tuned(root: Path) -> list[str]:
            source = f"variants.tuned={{from: {root}/sweep/best.yaml}}"
            return ["compare", str(pair), f"output={root}", source, "--list-runs"]

        commands = {
            "sweep": Command(
                arguments,
                lambda root: [
                    {k: v for k, v in row.items() if not k.startswith(("time", "memory"))}
                    for row in read_table(root / "sweep" / "trials.csv")
                ],
            ),
            "compare": Command(
                tuned, lambda root: (root / "tuned/tuned/seed-0/recipe.yaml").read_text()
            ),
            VERIFY: Command(lambda root: ["verify", str(root / "sweep")], None),
        }
        return Scene(output, "sweep", commands, leave_out=lambda name: "/trial-" in name)

    def models(self) -> Scene:
        """The folders of Wan and of a teacher."""
        root = self.root / "models"
        shutil.copytree(self.wan, root / "wan")
        shutil.copytree(self.teacher, root / "teacher")

        def begin(copy: Path) -> list[str]:
            paths = [f"model.path={copy}/wan", f"teachers.dino.path={copy}/teacher"]
            return ["train", str(self.recipe), f"output={copy}/o", "steps=1", *paths]

        command = Command(begin, lambda copy: trained(copy / "o" / "run"))
        kinds = (empty, cut, garbage, delete, folder, pointer, a_list)
        return Scene(root, ".", {"train": command}, kinds=kinds)


SCENES = ("run", "finished", "stage1", "comparison", "sweep", "models")


def main() -> int:
    torch.set_num_threads(1)
    os.environ["ALIGNLAB_CACHE"] = tempfile.mkdtemp()
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or list(SCENES)
    bad = 0
    with tempfile.TemporaryDirectory() as root:
        scenes = Scenes(Path(root))
        for name in names:
            verdicts = play(
                name, getattr(scenes, name)(), Path(root) / "copy", "--list" in sys.argv
            )
            for command in dict.fromkeys(command for command, _ in verdicts):
                counts = Counter(verdict for one, verdict in verdicts if one == command)
                shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
                print(f"{name:12} {command:8} {counts.total():4}: {shown}", flush=True)
                bad += sum(counts[verdict] for verdict in BAD)
    print("nothing silent, no traceback" if not bad else f"{bad} cases to mend")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
