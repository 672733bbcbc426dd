"""Which inputs a training was begun with, and the refusal of others.

`inputs.json` in a run's folder names each input with its digest. The digests of single files, which
tell what has changed, are there too where they are few; else they are in
`<output>/.inputs/<digest>.json`, which all runs on the same files share.

A run has begun when it has a checkpoint: until then its inputs may still be mended, unless they
were fixed for several runs that must read the same.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path

from pydantic import BaseModel, ValidationError

from alignlab.config.parts import TrainingConfig
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.errors import UserError, one_line
from alignlab.runs.atomic_files import write_text
from alignlab.runs.checkpoint_folders import (
    newest_step,
    step_folders,
    step_of,
    weight_copies,
)
from alignlab.runs.checksums import DamagedError, read_json, write_json
from alignlab.runs.init_source import SETTING, InitSource, named_run
from alignlab.runs.inputs import Input, init_input, model_inputs, read_inputs
from alignlab.runs.run_folder import RunFolder, only_writer

log = logging.getLogger(__name__)

MOST_INLINE = 64
DIGITS = 16  # of the digest of a single file: enough to tell which has changed
MOST_SHOWN = 3

Key = tuple[str, str]
"""Name and source of an input."""


class RecordedInput(BaseModel):
    """An `Input` as it is kept; without `files` where these are many.

    Records of older versions name no checkpoint.
    """

    name: str
    source: str
    digest: str
    num_files: int
    files: dict[str, str] | None = None
    checkpoint: str | None = None


class _Content(BaseModel):
    version: int = 1
    fixed: bool = False
    inputs: tuple[RecordedInput, ...] = ()


class InputRecord:
    """The inputs that a folder names.

    Args:
        folder: of a run, or of several runs that must read the same.
        output: the folder of all runs.

    Raises:
        UserError: the record is damaged.
    """

    def __init__(self, folder: Path, output: str) -> None:
        self.folder = folder
        self._path = folder / "inputs.json"
        self._lists = user_path(output) / ".inputs"
        content = self._read()
        self.exists = content is not None
        """False for what is older than records."""
        self.is_fixed = content is not None and content.fixed
        self.inputs = {} if content is None else {(i.name, i.source): i for i in content.inputs}

    def changes(self, inputs: Iterable[Input], *, has_begun: bool = False) -> dict[str, str]:
        """By name of the input, which files are others than recorded, in words.

        Args:
            inputs: of today.
            has_begun: nothing is read any more of what the run started from, which may have been
                trained further.
        """
        changed: dict[str, str] = {}
        for now in inputs:
            before = self.inputs.get((now.name, now.source))
            if before is None or before.digest == now.digest:
                continue
            if has_begun and now.name == SETTING and _may_be_started_from(before):
                continue
            changed[now.name] = _shown_files(self.files(before), _shortened(now.files))
        return changed

    def refuse_changes(
        self, inputs: Iterable[Input], *, since: str, remedy: str, has_begun: bool = False
    ) -> None:
        """Refuses inputs that are others than recorded.

        Args:
            inputs: of today.
            since: when they were recorded, such as `this run began`.
            remedy: what else can be done than to restore them.
            has_begun: see `changes`.

        Raises:
            UserError: it names the inputs and the files.
        """
        changed = self.changes(inputs, has_begun=has_begun)
        if changed:
            it = "it" if len(changed) == 1 else "them"
            raise UserError(f"{self.folder}: {_shown(changed, since)}: restore {it}, or {remedy}")

    def refuse_differences(self, other: "InputRecord", *, remedy: str) -> None:
        """Refuses a record that has other files under the same name.

        Raises:
            UserError: it names both folders, the input and the files.
        """
        for key in self.inputs.keys() & other.inputs.keys():
            here, there = self.inputs[key], other.inputs[key]
            if here.digest != there.digest:
                files = _shown_files(self.files(here), other.files(there))
                raise UserError(
                    f"{self.folder} and {other.folder} read different {here.name} ({files}): "
                    f"{remedy}"
                )

    def keep(self, inputs: Iterable[Input], *, fixed: bool, replace: bool = False) -> None:
        """Records inputs, besides those that are recorded already or in place of them."""
        new = [self._recorded(one) for one in inputs]
        self.add(new, fixed=fixed, replace=replace)

    def add(
        self, inputs: Iterable[RecordedInput], *, fixed: bool = False, replace: bool = False
    ) -> None:
        """Records what another record has; see `keep`."""
        new = {(one.name, one.source): one for one in inputs}
        self.inputs = new if replace else new | self.inputs
        self.is_fixed = fixed
        content = _Content(fixed=fixed, inputs=tuple(self.inputs.values()))
        if self._read() != content:
            values = content.model_dump(mode="json", exclude_none=True)
            write_json(self._path, values, shared=True)
        self.exists = True

    def files(self, recorded: RecordedInput) -> dict[str, str] | None:
        """The first digits of each file's digest, by name; None where the list is gone."""
        if recorded.files is not None:
            return recorded.files
        try:
            files: dict[str, str] = json.loads(self._list(recorded.digest).read_bytes())
        except (OSError, ValueError):
            return None
        return files if isinstance(files, dict) else None

    def _recorded(self, one: Input) -> RecordedInput:
        files = _shortened(one.files)
        entry = RecordedInput(
            name=one.name,
            source=one.source,
            digest=one.digest,
            num_files=len(files),
            checkpoint=one.checkpoint,
        )
        if len(files) <= MOST_INLINE:
            return entry.model_copy(update={"files": files})
        path = self._list(one.digest)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(files, indent=0), shared=True)
        return entry

    def _list(self, digest: str) -> Path:
        return self._lists / f"{digest[:DIGITS]}.json"

    def _read(self) -> _Content | None:
        if not self._path.exists():
            return None
        fix = "remove it; whether the inputs have changed since is then not known"
        content = read_json(self._path, fix=fix)
        try:
            return _Content.model_validate(content)
        except ValidationError as error:
            reason = one_line(error.errors(include_url=False)[0]["msg"])
            raise DamagedError(self._path, reason, fix) from error


def hold_inputs(folder: RunFolder, config: TrainingConfig) -> None:
    """Records what a training reads as it begins; refuses others when it is resumed or reused.

    A run without a record is older than records: that is told, and a resumed one has its inputs of
    today recorded. Inputs of a finished run that are not on this machine pass.

    Raises:
        UserError: inputs have changed, or cannot be read.
    """
    is_finished = folder.is_finished_at(config.steps)
    inputs = read_inputs(config, fetch=not is_finished)
    record = InputRecord(folder.path, config.output)
    if folder.has_begun:
        _tell_unknown(record)
        _refuse_changes(record, inputs)
    elif record.is_fixed:
        record.refuse_changes(
            inputs,
            since="this run was planned",
            remedy="give the command again that planned it",
        )
    if not is_finished:
        record.keep(inputs, fixed=record.is_fixed, replace=not folder.has_begun)


def fix_inputs(folder: RunFolder, config: TrainingConfig, inputs: list[Input]) -> None:
    """Records what a training has to read before it begins, for runs that must read the same.

    Args:
        folder: of the run.
        config: its recipe.
        inputs: of the run; those that are not on this machine are left out.

    Raises:
        UserError: it has begun with others, or another process trains it with others.
    """
    record = InputRecord(folder.path, config.output)
    if folder.has_begun:
        _refuse_changes(record, inputs)
    elif not record.exists:
        record.keep(inputs, fixed=True)
    elif record.changes(inputs) or not record.is_fixed:
        with only_writer(folder.path, wait=False):
            record.keep(inputs, fixed=True, replace=True)


def refuse_different_inputs(records: Iterable[InputRecord]) -> None:
    """Refuses runs that have read different files under the same name.

    Raises:
        UserError: it names two of them.
    """
    for one, other in combinations(records, 2):
        one.refuse_differences(
            other, remedy="remove the one whose files are not those of today, and train it again"
        )


def tell_changes(folder: RunFolder, config: RunConfig, *, model_only: bool = False) -> None:
    """Warns where inputs of a trained run are others now, or where that is not known.

    Args:
        folder: of the run.
        config: its recipe.
        model_only: nothing else is read.
    """
    record = InputRecord(folder.path, config.output)
    if not record.exists:
        _tell_unknown(record)
        return
    inputs = model_inputs(config) if model_only else read_inputs(config, fetch=False)
    changed = record.changes(inputs, has_begun=True)
    if changed:
        log.warning("%s: %s: what follows is of the new", folder.path, _shown(changed, "it began"))


def _refuse_changes(record: InputRecord, inputs: Iterable[Input]) -> None:
    record.refuse_changes(
        inputs, since="this run began", remedy="choose another name=...", has_begun=True
    )


def started_from(recorded: RecordedInput) -> Path | None:
    """The checkpoint or copy of weights that a run started from, if it is there as it was.

    Args:
        recorded: its `model.init_from`.
    """
    run = named_run(recorded.source)
    copies = weight_copies(run.checkpoints)
    for checkpoint in reversed([*copies, *step_folders(run.checkpoints)]):
        if recorded.checkpoint in (None, checkpoint.name):
            now = init_input(recorded.source, InitSource(run, checkpoint))
            if now.digest == recorded.digest:
                return checkpoint
    return None


def _may_be_started_from(recorded: RecordedInput) -> bool:
    """Whether that checkpoint is there, or gone since its run was trained further."""
    if started_from(recorded) is not None:
        return True
    checkpoints = named_run(recorded.source).checkpoints
    if recorded.checkpoint is None or (checkpoints / recorded.checkpoint).exists():
        return False
    return newest_step(checkpoints) > step_of(checkpoints / recorded.checkpoint)


def _tell_unknown(record: InputRecord) -> None:
    if not record.exists:
        log.warning(
            "%s: began before inputs were recorded: whether they have changed is not known",
            record.folder,
        )


def _shown(changed: Mapping[str, str], since: str) -> str:
    return f"{', '.join(changed)} changed since {since} ({'; '.join(changed.values())})"


def _shown_files(before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> str:
    if before is None or now is None:
        return "which file is not known, the list of them is gone"
    names = list(_changed_files(before, now))
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more


def _changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    yield from (name for name in sorted(before.keys() & now.keys()) if before[name] != now[name])
    yield from (f"{name} is gone" for name in sorted(before.keys() - now.keys()))
    yield from (f"{name} is new" for name in sorted(now.keys() - before.keys()))


def _shortened(files: Mapping[str, str]) -> dict[str, str]:
    return {name: digest[:DIGITS] for name, digest in files.items()}
