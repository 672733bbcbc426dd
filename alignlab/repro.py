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
    return list(_commands(RunFolder.open(run), output, seen=()))


def _commands(folder: RunFolder, output: str, seen: tuple[Path, ...]) -> Iterator[str]:
    config = load_training(folder.recipe)
    starts_from = {}
    if isinstance(config, RunConfig) and config.model.init_from is not None:
        named = user_path(config.model.init_from)
        is_checkpoint = named.parent.name == "checkpoints"
        source = RunFolder(named.parent.parent if is_checkpoint else named)
        if source.recipe.is_file() and source.path.resolve() not in seen:
            yield from _commands(source, output, (*seen, folder.path.resolve()))
            again = user_path(output) / load_training(source.recipe).name
            inner = again / "checkpoints" / named.name if is_checkpoint else again
            starts_from = {"model.init_from": str(inner)}
        else:
            yield f"# the run that it started from is not at {named}"
    yield f"# {folder.path}"
    facts = read_environment(folder.path / "environment.json")
    check_diffs(folder.path)
    starts, legs = read_code(folder.path), plan_of(folder, config).legs
    if not starts:
        yield f"# with which code it was trained is not known: commit {facts['commit']}"
    before: Start | None = None
    for place, leg in enumerate(legs):
        start = next((s for s in reversed(starts) if s["step"] <= leg.from_step), None)
        if start is not None and start != before:
            yield from _code(folder.path, start)
        if place == 0:
            yield from _versions(facts)
        if place and leg.from_step < legs[place - 1].steps:
            yield f"# the run above is stopped after its checkpoint of step {leg.from_step}"
        before = start
        yield _train(folder, config, leg, facts, start, {"output": output, **starts_from})
    if len(starts) > len(legs):
        yield f"# it was resumed with other code in between: {folder.path / 'code.json'}"


def _code(folder: Path, start: Start) -> Iterator[str]:
    if start["commit"] is None:
        yield shlex.join(["pip", "install", f"alignlab=={start['version']}"])
    else:
        yield shlex.join(["git", "checkout", start["commit"]])
    if start["diff"] is not None and start["diff_bytes"]:
        yield shlex.join(["git", "apply", str((folder / start["diff"]).resolve())])
    elif start["diff_bytes"]:
        yield (
            f"# the checkout had changes of {start['diff_bytes']:,} bytes, more than the "
            f"{MOST_BYTES:,} that are kept"
        )
    if start["untracked"]:
        yield f"# git did not know: {', '.join(start['untracked'])}"
    for name, version in start["plugins"].items():
        if package_version(name) != version:
            yield shlex.join(["pip", "install", f"{name}=={version}"])


def _versions(facts: Mapping[str, str]) -> Iterator[str]:
    """The packages of which another version is installed here."""
    wanted = []
    for name in PACKAGES:
        version = facts.get(name, "").split(THEN)[0]
        if version and version != "not installed" and package_version(name) != version:
            wanted.append(f"{name}=={version}")
    if wanted:
        yield shlex.join(["pip", "install", *wanted])
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
