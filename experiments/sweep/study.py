"""The Optuna study of a sweep: where it is kept, and which trial is next.

A study is created with all its trials, waiting. Workers only take waiting trials and never add
any, so the number of trials is exact however many workers there are; a trial whose worker died
waits again, under its own number and with the params that it had. Of trials that stand for the same
settings, one trains and the others take its result.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool

from alignlab.config.identity import has_hash, identity, settings_hash
from alignlab.config.merging import flatten
from alignlab.config.paths import expanded_url, sqlite_url, user_path
from alignlab.config.recipe_file import read_recipe
from alignlab.errors import UserError, first_line
from alignlab.experiments.sweep.config import SweepConfig, load_sweep
from alignlab.experiments.sweep.draw import FIXED, fix_params
from alignlab.experiments.sweep.lease import GRACE_S, LEASE, Lease, Watch
from alignlab.experiments.sweep.metrics import directions
from alignlab.experiments.sweep.samplers import (
    build_pruner,
    build_sampler,
    experimental_accepted,
    reads_earlier_trials,
)
from alignlab.experiments.sweep.space import grid_points, own_params, settings_of
from alignlab.experiments.sweep.storage_check import (
    check_storage_file,
    storage_errors,
    storage_file,
)
from alignlab.passwords import without_password
from alignlab.recipe import NUMBERLESS as RUN_NUMBERLESS
from alignlab.recipe import first_difference
from alignlab.runs.disk_errors import FULL, as_os_error
from alignlab.runs.file_lock import file_lock
from alignlab.runs.out_paths import make_output_folder
from alignlab.runs.run_folder import RunFolder

log = logging.getLogger(__name__)

RECIPE_HASH = "alignlab.recipe_hash"
TRAINS = "trains"  # user attribute of a trial that is the one to train its settings
SAME_AS = "same_as"  # user attribute: number of the trial whose result was taken
METRICS = "metrics"  # user attribute: metric -> one value per finished seed
LOCK_WAIT_S = 60
# What changes no number of a trial: a sweep may get more trials, or move.
NUMBERLESS: dict[str, Any] = {
    "base": {
        **dict.fromkeys(("name", "output", "tracking", "checkpoint"), True),
        "data": RUN_NUMBERLESS["data"],
        "model": RUN_NUMBERLESS["model"],
    },
    "trials": True,
    "storage": True,
    "launch": True,
}


class SweepStudy:
    """A study and its storage."""

    def __init__(self, config: SweepConfig, study: optuna.Study, storage: BaseStorage) -> None:
        self.config = config
        self.study = study
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self.size = len(_plan(config))
        """How many trials there are, or will be once all are added."""
        self._watch = Watch()
        if isinstance(study.pruner, optuna.pruners.HyperbandPruner):
            # else it does so at its first decision, and draws before that know no brackets
            study.pruner._try_initialization(study)
        self._unseen: set[tuple[int, str]] | None = None  # trial and owner, of those first found
        self._settings: dict[int, str] = {}  # of trials, by number

    def _lock(self) -> AbstractContextManager[None]:
        return _only_one(sweep_folder(self.config), ".claims.lock")

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials in order of number; without `states`, all."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def num_finished(self) -> int:
        """How many trials have ended, well or not."""
        return sum(trial.state.is_finished() for trial in self.trials())

    def is_finished(self) -> bool:
        """Whether all trials that the sweep should have are finished."""
        trials = self.trials()
        return len(trials) >= self.size and all(trial.state.is_finished() for trial in trials)

    def claim(self) -> tuple[optuna.Trial, Lease] | None:
        """Takes the first waiting trial; None while there is none."""
        with self._lock():  # SQLite cannot lock a row, so two workers could take the same one
            for trial in self.trials(TrialState.WAITING):
                trial_id = self._trial_id(trial.number)
                try:
                    taken = self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
                except UpdateFinishedTrialError:
                    continue
                if taken:
                    lease = Lease(self._storage, trial_id)
                    break
            else:
                return None
        return self._drawn(trial_id, trial.number), lease

    def _drawn(self, trial_id: int, number: int) -> optuna.Trial:
        """The trial with the params that an uninterrupted sweep gives it."""
        # new each time: Optuna keeps in a study what it has read of the trials
        study = optuna.Study(
            self.study.study_name,
            self._storage,
            sampler=optuna.samplers.RandomSampler(),  # nothing is left to draw
            pruner=self.study.pruner,
        )
        fix_params(study, trial_id, self.config)
        trial = optuna.Trial(study, trial_id)
        study.sampler = build_sampler(self.config.sampler, number)  # is told how the trial ends
        return trial

    def claim_settings(self, number: int) -> FrozenTrial | None:
        """Decides whether a running trial, whose params are drawn, trains its settings.

        Returns:
            None: it trains. A trial that ended: its result is to be taken, and further seeds of one
            that was pruned are to be trained. A trial that has not ended: that one trains them.
        """
        with self._lock():  # two workers may have drawn the same
            trials = self.trials()
            mine, settings = trials[number], self._settings_of(trials[number])
            if settings is None:
                return None
            same = [t for t in trials if t is not mine and self._settings_of(t) == settings]
            complete = [t for t in same if t.state == TrialState.COMPLETE]
            busy = [t for t in same if _comes_before(t, mine)]
            # of one that was pruned inside its first run there is nothing to take
            pruned = [t for t in same if t.state == TrialState.PRUNED and _num_seeds(t)]
            if complete or busy:
                return (complete or busy)[0]
            self._storage.set_trial_user_attr(self._trial_id(number), TRAINS, True)
            return max(pruned, key=_num_seeds, default=None)

    def _settings_of(self, trial: FrozenTrial) -> str | None:
        if trial.number not in self._settings:
            settings = settings_of(self.config, trial.params)
            if settings is None:
                return None
            self._settings[trial.number] = settings
        return self._settings[trial.number]

    def put_back(self, number: int, claim: Any) -> bool:
        """Lets a running trial wait again; False if another claim on it was made meanwhile."""
        with self._lock():
            trial_id = self._trial_id(number)
            trial = self._storage.get_trial(trial_id)
            if trial.state != TrialState.RUNNING or trial.user_attrs.get(LEASE) != claim:
                return False
            # first the claim: the next holder is not silent because the dead one was
            self._storage.set_trial_user_attr(trial_id, LEASE, None)
            self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
            return True

    def put_back_dead(self) -> list[int]:
        """Lets the trials of dead workers wait again; returns their numbers."""
        dead = [t for t in self.trials(TrialState.RUNNING) if self._watch.is_dead(t)]
        numbers = [t.number for t in dead if self.put_back(t.number, t.user_attrs.get(LEASE))]
        for number in numbers:
            log.info("trial %d: its worker died, it resumes from its checkpoint", number)
        return numbers

    def is_settled(self) -> bool:
        """Whether the next trial may be drawn; puts the trials of dead workers back.

        A trial that was running when this process came has a worker that lives, or must come
        first. Of one on another machine only time tells.
        """
        self.put_back_dead()
        if not reads_earlier_trials(self.config):
            return True
        unseen = {
            (t.number, (t.user_attrs.get(LEASE) or {}).get("owner", ""))
            for t in self.trials(TrialState.RUNNING)
            if not self._watch.is_alive(t)
        }
        if unseen and self._unseen is None:
            log.info(
                "trial %s: no sign of life of its worker yet; the next trial is drawn once there "
                "is one, or after %d seconds",
                *(", ".join(str(number) for number, _ in sorted(unseen)), GRACE_S),
            )
        self._unseen = unseen if self._unseen is None else self._unseen & unseen
        return not self._unseen

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def _comes_before(trial: FrozenTrial, mine: FrozenTrial) -> bool:
    """Whether `trial`, not ended, is the one that trains the settings of both.

    Who has begun comes first; a lower number does where both have, or where the other waits for a
    new worker: that one is claimed next.
    """
    if not trial.user_attrs.get(TRAINS) or trial.state.is_finished():
        return False
    begun = trial.state == TrialState.RUNNING and not mine.user_attrs.get(TRAINS)
    return begun or trial.number < mine.number


def _num_seeds(trial: FrozenTrial) -> int:
    return max(map(len, trial.user_attrs[METRICS].values()), default=0)


def sweep_folder(config: SweepConfig) -> Path:
    """Where everything of a sweep lies."""
    return user_path(config.output) / config.name


def _only_one(folder: Path, lock: str) -> AbstractContextManager[None]:
    """Waits until no other process of the sweep is at the same place."""
    return file_lock(folder / lock, waiting=lambda: f"waiting for a worker of {folder}")


def storage_url(config: SweepConfig) -> str:
    """The storage as Optuna's own commands take it (`optuna-dashboard URL`)."""
    if config.storage is None:
        return sqlite_url((sweep_folder(config) / "study.db").resolve())
    url = expanded_url(config.storage)
    path = re.sub(r"^/?~", "~", url.removeprefix("journal://"))
    return str(user_path(path)) if path.startswith("~") else path


def shown_url(config: SweepConfig) -> str:
    """The storage without its password."""
    return without_password(storage_url(config))


def create_study(config: SweepConfig) -> SweepStudy:
    """Creates the study with all its trials waiting, or opens it to resume.

    Raises:
        UserError: the study is of another recipe or larger, or the storage cannot be used.
    """
    folder = make_output_folder(user_path(config.output), config.name)
    with _only_one(folder, ".create.lock"), storage_errors(shown_url(config)):
        _check_storage(config)
        storage = _open_storage(config)
        study = _opened(config, storage)
        recipe_hash = study.user_attrs.get(RECIPE_HASH)
        if not _is_same_sweep(config, recipe_hash) and _kept_nothing(config, study):
            log.info(
                "%s: its sweep %r of another recipe kept no step: it begins anew",
                *(shown_url(config), config.name),
            )
            optuna.delete_study(study_name=config.name, storage=storage)
            study = _opened(config, storage)
            recipe_hash = None
        elif recipe_hash is None:
            _tell_lost_study(config)
        if recipe_hash is None:
            with experimental_accepted():
                study.set_metric_names([metric.name for metric in config.metric])
            study.set_user_attr(RECIPE_HASH, settings_hash(config, NUMBERLESS))  # last: all is set
        _check_same_sweep(config, recipe_hash)
        if recipe_hash is not None and not has_hash(config, recipe_hash, NUMBERLESS):
            # its recipe is soon written anew, without the setting that is no more
            study.set_user_attr(RECIPE_HASH, settings_hash(config, NUMBERLESS))
        _add_trials(config, study)
    return SweepStudy(config, study, storage)


def _opened(config: SweepConfig, storage: BaseStorage) -> optuna.Study:
    return optuna.create_study(
        storage=storage,
        study_name=config.name,
        directions=directions(config),
        pruner=build_pruner(config),
        load_if_exists=True,
    )


def _kept_nothing(config: SweepConfig, study: optuna.Study) -> bool:
    """Whether no trial is finished or running, and no run of one has kept a step."""
    watch = Watch()
    for trial in study.get_trials(deepcopy=False):
        is_left = trial.state == TrialState.RUNNING and watch.is_dead(trial)
        if trial.state != TrialState.WAITING and not is_left:
            return False
    recipes = sweep_folder(config).glob("trial-*/seed-*/recipe.yaml")
    return not any(RunFolder(recipe.parent).has_begun for recipe in recipes)


def join_study(config: SweepConfig) -> SweepStudy:
    """Opens the study that another process has created.

    Raises:
        UserError: there is none, it is of another recipe, or the storage cannot be used.
    """
    make_output_folder(user_path(config.output), config.name)
    return read_study(config, "start the sweep without --join first, or name its storage")


def read_study(config: SweepConfig, fix: str) -> SweepStudy:
    """Opens a study that is there, and writes nothing.

    Args:
        config: its recipe.
        fix: what to do if there is none.

    Raises:
        UserError: as `join_study`.
    """
    missing = UserError(f"no study {config.name!r} in {shown_url(config)}: {fix}")
    path = storage_file(storage_url(config))
    if path is not None and not path.exists():
        raise missing  # to open it would make an empty one
    _check_storage(config)
    with storage_errors(shown_url(config)):
        storage = _open_storage(config)
    try:
        study = optuna.load_study(
            storage=storage,
            study_name=config.name,
            pruner=build_pruner(config),
        )
    except KeyError:
        raise missing from None
    _check_same_sweep(config, study.user_attrs.get(RECIPE_HASH))
    return SweepStudy(config, study, storage)


@contextmanager
def named_storage(config: SweepConfig) -> Iterator[None]:
    """Makes an error of a full or read-only disk under an SQLite storage say which file it is.

    Raises:
        OSError: in place of Optuna's.
    """
    try:
        yield
    except (StorageInternalError, DatabaseError) as error:
        path = storage_file(storage_url(config))
        known = None if path is None else as_os_error(error, path)
        if known is None:
            raise
        raise known from error


def _check_storage(config: SweepConfig) -> None:
    path = storage_file(storage_url(config))
    if path is not None and path.exists() and not _is_unused(config, path):
        check_storage_file(path)


def _is_unused(config: SweepConfig, path: Path) -> bool:
    """Whether a file is what a process leaves that was killed before the first trial."""
    return path.is_file() and not path.stat().st_size and not _trial_folders(config)


def _tell_lost_study(config: SweepConfig) -> None:
    """Warns of a new study where trials lie already."""
    if trials := _trial_folders(config):
        log.warning(
            "%s: the study is new, though %d trials lie there, such as %s: the storage %s was lost "
            "or is another; trials that are drawn again take their finished runs",
            *(sweep_folder(config), len(trials), trials[0].name, shown_url(config)),
        )


def _trial_folders(config: SweepConfig) -> list[Path]:
    return sorted(path for path in sweep_folder(config).glob("trial-*") if path.is_dir())


def _plan(config: SweepConfig) -> Sequence[dict[str, Any] | None]:
    """The params of every trial, None where the sampler draws them; the recipe's own are first."""
    if config.sampler.name == "grid":
        return grid_points(config)
    assert config.trials is not None
    return [own_params(config), *[None] * (config.trials - 1)]


def _add_trials(config: SweepConfig, study: optuna.Study) -> None:
    points = _plan(config)
    present = len(study.get_trials(deepcopy=False))
    if present > len(points):
        raise UserError(
            f"trials: the study has {present} trials already, it cannot shrink to {len(points)}: "
            f"give trials={present} or more, or choose another name"
        )
    for point in points[present:]:
        attrs = None if point is None else {FIXED: point}
        study.add_trial(optuna.create_trial(state=TrialState.WAITING, system_attrs=attrs))


def _is_same_sweep(config: SweepConfig, recipe_hash: str | None) -> bool:
    if recipe_hash is None or has_hash(config, recipe_hash, NUMBERLESS):
        return True
    return _only_counted_clips(config)


def _only_counted_clips(config: SweepConfig) -> bool:
    """Whether the study's recipe is this one but for `data.cache_clips` of an older version.

    That changed no number, but was in the hash.
    """
    path = sweep_folder(config) / "recipe.yaml"
    try:
        data = read_recipe(path, []).get("data")
        if not isinstance(data, Mapping) or "cache_clips" not in data:
            return False
        if data.get("name") == "folder" and "split_rule" not in data:
            return False  # it dealt the clips to train and val by another rule
        there = load_sweep(path, stored=True)
    except UserError:
        return False
    return identity(there, NUMBERLESS) == identity(config, NUMBERLESS)


def _check_same_sweep(config: SweepConfig, recipe_hash: str | None) -> None:
    if not _is_same_sweep(config, recipe_hash):
        difference = _shown_difference(sweep_folder(config) / "recipe.yaml", config)
        raise UserError(
            f"{shown_url(config)} holds a sweep {config.name!r} of another recipe{difference}: "
            "choose another name, or remove the study and its folder"
        )


def _shown_difference(path: Path, config: SweepConfig) -> str:
    """The first setting that the study's recipe has otherwise, in words; empty if it is not here.

    The recipe lies in the folder of the process that created the study.
    """
    try:
        there, here = _settings(load_sweep(path, stored=True)), _settings(config)
    except UserError:
        return ""
    difference = first_difference(there, here)
    return f" ({difference})" if difference else ""


def _settings(config: SweepConfig) -> dict[str, Any]:
    """What numbers of trials depend on, by dotted name as a recipe has it."""
    kept = config.model_dump(mode="json", exclude=NUMBERLESS)
    return flatten(kept.pop("base") | kept)


def _open_storage(config: SweepConfig) -> BaseStorage:
    url = storage_url(config)
    if "://" not in url:
        if not url.endswith((".log", ".journal")) and "://" not in str(config.storage):
            raise UserError(
                f"storage: {config.storage!r} is neither a URL nor a journal file: write "
                "sqlite:///PATH, postgresql://..., journal:///PATH, or a path that ends in .log or "
                ".journal"
            )
        Path(url).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(url))
    engine: dict[str, Any] = {"poolclass": NullPool}  # a server drops what a long run leaves idle
    if url.startswith("sqlite"):
        # one writer waits for another; SQLite's own limit of 5 s is short for many workers
        engine["connect_args"] = {"timeout": LOCK_WAIT_S}
    try:
        return get_storage(RDBStorage(url, engine_kwargs=engine))
    except ImportError as error:
        raise UserError(
            f"storage: {shown_url(config)} needs a database driver: {first_line(error)}; "
            "for PostgreSQL: pip install 'alignlab[postgres]'"
        ) from None
    except (OperationalError, ArgumentError, NoSuchModuleError) as error:
        known = as_os_error(error, storage_file(url))
        if known is not None and known.errno in FULL:
            raise known from error
        raise UserError(f"storage: {shown_url(config)}: {first_line(error)}") from None
