"""The commands that make a run again."""

import shlex
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from alignlab import checkout
from alignlab.config.merging import flatten
from alignlab.config.parts import TrainingConfig
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.environment import PACKAGES, THEN, package_version, read_environment
from alignlab.models.model_files import is_relative
from alignlab.recipe import load_training
from alignlab.runs.checkpoint_folders import has_weights_name, is_copy_name, step_of
from alignlab.runs.code_record import MOST_BYTES, Start, check_diffs, read_code
from alignlab.runs.init_source import SETTING, named_run
from alignlab.runs.input_record import InputRecord, started_from
from alignlab.runs.prolong import Leg, plan_of
from alignlab.runs.run_folder import RunFolder
from alignlab.stage1.compatibility import stage1_folder_of
from alignlab.stage1.config import Stage1Config

OUTPUT = "repro"


def repro_commands(run: Path, output: str = OUTPUT) -> list[str]:
    """Shell commands, and comments on what no command does, in order.

    Those of the run that it started from (`model.init_from`) come first.

    Args:
        run: a run folder, of Stage 1 as well.
        output: where the commands make it again.

    Raises:
        UserError: there is no run, or what it keeps is damaged.
    """
    return list(_commands(RunFolder.open(run), output, _Machine(), seen=()))


class _Machine:
    """Where the commands are carried out, as those so far have left it."""

    def __init__(self) -> None:
        self._code: tuple[object, ...] = ()
        self._diff: Path | None = None
        self._packages: dict[str, str] = {}

    def set_code(self, folder: Path, start: Start) -> Iterator[str]:
        """Brings the checkout, in which alignlab is installed, to the code of a start."""
        code = (start["version"], start["commit"], start["diff_sha256"], *start["untracked"])
        if code != self._code:
            if self._diff is not None:  # else it would be in the way of the next commit and diff
                yield _git("apply", "--reverse", str(self._diff))
            self._code, self._diff = code, None
            if start["commit"] is None:
                yield shlex.join(["pip", "install", f"alignlab=={start['version']}"])
            else:
                yield _git("checkout", start["commit"])
            if start["diff"] is not None and start["diff_bytes"]:
                self._diff = (folder / start["diff"]).resolve()
                yield _git("apply", str(self._diff))
            elif start["diff_bytes"]:
                yield (
                    f"# the checkout had changes of {start['diff_bytes']:,} bytes, more than the "
                    f"{MOST_BYTES:,} that are kept"
                )
            if start["untracked"]:
                yield f"# git did not know: {', '.join(start['untracked'])}"
        yield from self.install(start["plugins"])

    def install(self, wanted: Mapping[str, str]) -> Iterator[str]:
        """Installs the packages of which another version is there."""
        lacking = {
            name: version
            for name, version in wanted.items()
            if self._packages.get(name, package_version(name)) != version
        }
        self._packages |= lacking
        if lacking:
            yield shlex.join(["pip", "install", *(f"{n}=={v}" for n, v in lacking.items())])


def _git(*arguments: str) -> str:
    """In alignlab's own checkout, wherever the trainings are; else in the folder one stands in."""
    is_there = (checkout.FOLDER / ".git").exists()
    return shlex.join(["git", *(("-C", str(checkout.FOLDER)) if is_there else ()), *arguments])


class _Until(NamedTuple):
    """How far a run is made that another one starts from.

    Args:
        step: of the weights that are read; None: that is not known.
        named: the checkpoint or copy of weights that is named; None: the last weights are meant.
    """

    step: int | None
    named: str | None

    def legs(self, legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
        """Those up to that step."""
        if self.step is None:
            return legs
        return tuple(leg for leg in legs if leg.from_step < self.step)

    def settings(self, config: TrainingConfig, steps: int) -> dict[str, str]:
        """What keeps the weights there, of a run of so many steps; no number changes with it."""
        written = config.checkpoint
        settings = {} if written.keep_finished == "all" else {"checkpoint.keep_finished": "all"}
        if self.named is None or self.step is None:
            return settings
        if is_copy_name(self.named):
            copies = written.weights_every
            if copies is None or self.step % copies:  # it was set otherwise then
                settings["checkpoint.weights_every"] = str(self.step)
            return settings
        if self.step == steps:
            return settings
        every = written.every
        if self.step % every:  # it was written by the clock, or at a signal
            every = self.step
            settings["checkpoint.every"] = str(every)
        if written.keep_every is not None:
            settings["checkpoint.keep_every"] = "null"
        if written.every_minutes is not None:
            settings["checkpoint.every_minutes"] = "null"
        keep = steps // every - self.step // every + 2
        return settings | {"checkpoint.keep": str(max(keep, written.keep))}


def _source_commands(
    folder: RunFolder, config: RunConfig, output: str, machine: _Machine, seen: tuple[Path, ...]
) -> Generator[str, None, dict[str, str]]:
    """The commands of the run that another one started from; returns the settings that name it."""
    assert config.model.init_from is not None
    named, source = user_path(config.model.init_from), named_run(config.model.init_from)
    if not source.recipe.is_file() or source.path.resolve() in seen:
        yield f"# the run that it started from is not at {named}"
        return {}
    recorded = InputRecord(folder.path, config.output).inputs.get((SETTING, config.model.init_from))
    found = None if recorded is None else started_from(recorded)
    checkpoint = None if recorded is None else recorded.checkpoint
    own_name = named.name if has_weights_name(named.name) else None
    if own_name is not None:
        checkpoint = own_name
    elif found is not None:
        checkpoint = found.name
    step = None if checkpoint is None else step_of(Path(checkpoint))
    there = load_training(source.recipe)
    is_changed = recorded is not None and found is None and checkpoint is not None
    if is_changed and (source.checkpoints / str(checkpoint)).exists():
        yield f"# {source.checkpoints / str(checkpoint)} holds other weights than it started from"
    if step is None and plan_of(source, there).was_prolonged:
        yield f"# after which of its parts it started from {named} is not known"
    until = _Until(step, own_name)
    yield from _commands(source, output, machine, (*seen, folder.path.resolve()), until)
    again = user_path(output) / there.name
    inner = named.relative_to(source.path)  # a checkpoint, or the run
    return {SETTING: str(again / inner)}


def _commands(
    folder: RunFolder,
    output: str,
    machine: _Machine,
    seen: tuple[Path, ...],
    until: _Until | None = None,
) -> Iterator[str]:
    config = load_training(folder.recipe)
    changed: dict[str, str] = {}
    if isinstance(config, RunConfig) and config.model.init_from is not None:
        changed = yield from _source_commands(folder, config, output, machine, seen)
    yield f"# {folder.path}"
    if relative := _relative_paths(config):
        names = ", ".join(f"{name} ({path})" for name, path in relative.items())
        yield f"# to be trained in the folder where it was, from which it reads {names}"
    facts = read_environment(folder.path / "environment.json")
    check_diffs(folder.path)
    starts, legs = read_code(folder.path), plan_of(folder, config).legs
    if until is not None:
        legs = until.legs(legs)
        changed |= until.settings(config, legs[-1].steps)
        starts = [start for start in starts if start["step"] < legs[-1].steps]
    if not starts:
        yield f"# with which code it was trained is not known: commit {facts['commit']}"
    for place, leg in enumerate(legs):
        start = next((s for s in reversed(starts) if s["step"] <= leg.from_step), None)
        if start is not None:
            yield from machine.set_code(folder.path, start)
        if place == 0:
            yield from _versions(facts, machine)
        if place and leg.from_step < legs[place - 1].steps:
            yield f"# the run above is stopped after its checkpoint of step {leg.from_step}"
        yield _train(folder, config, leg, facts, start, {"output": output, **changed})
    if len(starts) > len(legs):
        yield f"# it was resumed with other code in between: {folder.path / 'code.json'}"


def _relative_paths(config: TrainingConfig) -> dict[str, str]:
    """What a recipe names by a path that depends on the folder where the command is given."""
    named = {
        key: path
        for key, path in flatten(config.model_dump(mode="json")).items()
        if key.endswith(".path") and isinstance(path, str)
    }
    if isinstance(config, RunConfig):
        for alias, objective in config.objectives.items():
            stage1 = stage1_folder_of(alias, objective)
            if stage1 is not None:
                named[stage1.key] = stage1.folder
    return {key: path for key, path in named.items() if is_relative(path)}


def _versions(facts: Mapping[str, str], machine: _Machine) -> Iterator[str]:
    """The packages that it was trained with, and what no package says."""
    known = {name: facts.get(name, "").split(THEN)[0] for name in PACKAGES}
    yield from machine.install({k: v for k, v in known.items() if v not in ("", "not installed")})
    yield f"# python {facts['python']} on {facts['platform']}, {facts['device']}"


def _train(
    folder: RunFolder,
    config: TrainingConfig,
    leg: Leg,
    facts: Mapping[str, str],
    start: Start | None,
    settings: dict[str, str],
) -> str:
    """The command of a leg."""
    variables = dict(start["variables"]) if start is not None else {}
    variables["OMP_NUM_THREADS"] = facts["threads"].split(THEN)[0]
    processes = facts.get("processes", "1").split(THEN)[0]
    command = ["alignlab"]
    if processes != "1":
        command = ["torchrun", f"--nproc-per-node={processes}", "-m", "alignlab.cli"]
    command += ["stage1", config.stage1.kind] if isinstance(config, Stage1Config) else ["train"]
    said = {"optim.resume_schedule": leg.resume_schedule} if leg.resume_schedule else {}
    settings = settings | {"steps": str(leg.steps)} | said
    command += [str(folder.recipe.resolve()), *(f"{k}={v}" for k, v in settings.items())]
    assigned = [f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
    return " ".join([*assigned, shlex.join(command)])
