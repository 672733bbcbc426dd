"""`~` and the characters that URLs escape work in every path: settings, storages, options."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import typer
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.config.data import FolderConfig
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.data.folder import FolderDataset
from alignlab.data.video import write_mp4
from alignlab.errors import UserError
from alignlab.experiments.sweep.config import SweepConfig, load_sweep
from alignlab.experiments.sweep.study import create_study, join_study, storage_url, sweep_folder
from alignlab.losses.stage1.folder import read_stage1_info
from alignlab.models.model_files import on_disk
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking import Tracker
from small_recipes import sweep_recipe

MakeConfig = Callable[..., RunConfig]
ODD = "a%2Fb %25? #c@d:e"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, and a working folder that must stay empty."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("place", [f"~/{ODD}", f"{{tmp}}/{ODD}"])
def test_output_and_its_database(make_config: MakeConfig, home: Path, place: str) -> None:
    output = place.format(tmp=home)
    config = make_config("tracking.mlflow=sqlite").model_copy(update={"output": output})
    folder = RunFolder.create(config)
    with Tracker(folder, config, start=0, environment={}) as tracker:
        tracker.log(1, {"loss": 0.5})
    assert folder.path == home / ODD / config.name
    assert (home / ODD / "mlflow.db").stat().st_size > 0
    assert {path.relative_to(home).parts[0] for path in files(home.parent / "home")} == {ODD}
    assert files(home.parent / "work") == []


def test_a_sqlite_database_named_by_its_url(make_config: MakeConfig, home: Path) -> None:
    config = make_config("tracking.mlflow=sqlite:///~/mine.db")
    with Tracker(RunFolder.create(config), config, start=0, environment={}):
        pass
    assert (home / "mine.db").stat().st_size > 0 and files(home.parent / "work") == []


def test_data_and_what_lies_in_it(home: Path) -> None:
    folder = home / ODD
    names = [f"{i} {ODD.replace('/', '-')}.mp4" for i in range(2)]
    for name in names:
        write_mp4(folder / name, torch.zeros(5, 32, 32, 3, dtype=torch.uint8), 8)
    rows = [f'{name},"a, {name}"' for name in names]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]))
    config = FolderConfig(
        path=f"~/{ODD}", metadata="metadata.csv", frames=5, size=(32, 32), fps=8, val_fraction=0.5
    )
    samples = [FolderDataset(config, split)[0] for split in ("train", "val")]
    assert sorted(sample.key for sample in samples) == names


def test_models_and_stage1_networks(home: Path) -> None:
    (home / ODD).mkdir()
    assert on_disk(f"~/{ODD}") == home / ODD
    (home / ODD / "stage1.json").write_text("{}")
    with pytest.raises(ValueError, match=r"stage1\.json: kind"):  # found, and read
        read_stage1_info(f"~/{ODD}", "sara")


@pytest.fixture
def make_sweep(recipe_file: Path, tmp_path: Path) -> Callable[..., SweepConfig]:
    space = "\nspace: {objectives.ra.weight: {kind: float, low: 0.1, high: 10.0}}"
    path = sweep_recipe(recipe_file, tmp_path / "s.yaml", f"{space}\nmetric: val/flow\ntrials: 1\n")

    def make(storage: str | None, output: str = str(tmp_path)) -> SweepConfig:
        return load_sweep(path, [f"output={output}"]).model_copy(update={"storage": storage})

    return make


@pytest.mark.parametrize(
    ("storage", "made"),
    [
        (None, f"{ODD}/s/study.db"),
        ("~/s.log", "s.log"),
        ("journal://~/s.journal", "s.journal"),
        ("journal:///~/s.log", "s.log"),
        ("sqlite:///~/s.db", "s.db"),
        ("{home}/" + ODD + ".log", ODD + ".log"),
    ],
)
def test_the_storage_of_a_sweep(
    make_sweep: Callable[..., SweepConfig], home: Path, storage: str | None, made: str
) -> None:
    place = None if storage is None else storage.format(home=home)
    config = make_sweep(storage=place, output=f"'~/{ODD}'")
    create_study(config)
    assert (home / made).is_file(), files(home.parent)
    assert len(join_study(config).trials()) == 1
    assert sweep_folder(config) == home / ODD / config.name
    assert files(home.parent / "work") == []


def test_other_storages_stay_as_they_are(make_sweep: Callable[..., SweepConfig]) -> None:
    for url in ("postgresql://me@host/~db", "sqlite:////tmp/a.db", "/tmp/~.log"):
        assert storage_url(make_sweep(storage=url)) == url


def test_a_user_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match=r"^~nobody-here/x: there is no such home folder"):
        user_path("~nobody-here/x")


def paths_of(application: typer.Typer) -> Iterator[tuple[str, Any]]:
    """Name and typer's description of every argument and option whose value is a path."""
    for command in application.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if "Path" in str(get_args(hint)[:1]):
                yield name, get_args(hint)[1]
    for group in application.registered_groups:
        assert group.typer_instance is not None
        yield from paths_of(group.typer_instance)


def test_every_option_of_the_command_line_that_is_a_path(home: Path) -> None:
    paths = list(paths_of(app))
    names = {"run", "folder", "folders", "out", "reference", "path", "old", "new", "target"}
    assert names | {"prompts"} == {name for name, _ in paths}
    assert [name for name, described in paths if described.parser is not user_path] == []
    done = CliRunner().invoke(app, ["export", "~/no-run", "--out=~/x"])
    assert str(home / "no-run") in f"{done.exception}{done.output}"
