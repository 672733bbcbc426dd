"""The commands that make a run again."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from alignlab.config.parts import TrainingConfig
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.environment import PACKAGES, THEN, package_version, read_environment
from alignlab.recipe import load_training
from alignlab.runs.code_record import MOST_BYTES, Start, check_diffs, read_code
from alignlab.runs.init_source import named_run
from alignlab.runs.prolong import Leg, plan_of
from alignlab.runs.run_folder import RunFolder
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
                yield shlex.join(["git", "apply", "--reverse", str(self._diff)])
            self._code, self._diff = code, None
            if start["commit"] is None:
                yield shlex.join(["pip", "install", f"alignlab=={start['version']}"])
            else:
                yield shlex.join(["git", "checkout", start["commit"]])
            if start["diff"] is not None and start["diff_bytes"]:
                self._diff = (folder / start["diff"]).resolve()
                yield shlex.join(["git", "apply", str(self._diff)])
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


def _commands(
    folder: RunFolder, output: str, machine: _Machine, seen: tuple[Path, ...]
) -> Iterator[str]:
    config = load_training(folder.recipe)
    starts_from = {}
    if isinstance(config, RunConfig) and config.model.init_from is not None:
        named, source = user_path(config.model.init_from), named_run(config.model.init_from)
        if source.recipe.is_file() and source.path.resolve() not in seen:
            yield from _commands(source, output, machine, (*seen, folder.path.resolve()))
            again = user_path(output) / load_training(source.recipe).name
            inner = named.relative_to(source.path)  # a checkpoint, or the run
            starts_from = {"model.init_from": str(again / inner)}
        else:
            yield f"# the run that it started from is not at {named}"
    yield f"# {folder.path}"
    facts = read_environment(folder.path / "environment.json")
    check_diffs(folder.path)
    starts, legs = read_code(folder.path), plan_of(folder, config).legs
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
        yield _train(folder, config, leg, facts, start, {"output": output, **starts_from})
    if len(starts) > len(legs):
        yield f"# it was resumed with other code in between: {folder.path / 'code.json'}"


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
