"""Recipes that name an implementation of another package, here and where it is not installed."""

import json
from pathlib import Path

import pytest

from alignlab.doctor import print_diagnosis
from alignlab.errors import UserError
from alignlab.recipe import dump, load_run, load_training, recipe_hash
from alignlab.runs.run_folder import RunFolder
from alignlab.train import train
from command_line import alignlab, refused
from made_packages import kernel_package
from tiny_runs import MakeConfig


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [value for row in rows for key, value in row.items() if key.startswith("loss/ra")]


def test_a_run_with_it_has_the_losses_of_chunked(make_config: MakeConfig, tmp_path: Path) -> None:
    with kernel_package(tmp_path / "installed", mine="tiny_kernel:BY_PRODUCT"):
        usual, mine = (
            train(make_config(f"objectives.ra.impl={impl}", f"name={impl}"))
            for impl in ("chunked", "mine")
        )
    assert losses(usual)[0] > 0.1
    assert losses(mine) == pytest.approx(losses(usual), rel=1e-4, abs=1e-6)
    facts = json.loads((mine / "environment.json").read_text())
    assert facts["kernel_packages"] == "tiny-kernels 1.0"


def test_a_recipe_keeps_the_package_that_it_needs(make_config: MakeConfig, tmp_path: Path) -> None:
    stored = tmp_path / "stored.yaml"
    with kernel_package(tmp_path / "installed", mine="tiny_kernel:BY_PRODUCT"):
        config = make_config("objectives.ra.impl=mine")
        assert config.objectives["ra"].model_dump()["impl"] == "mine@tiny-kernels"
        stored.write_text(dump(config))
        assert load_run(stored) == config
        assert recipe_hash(load_run(stored)) == recipe_hash(config)
        assert recipe_hash(config) != recipe_hash(make_config())
    line = refused("train", str(stored), "--print-config")
    assert (
        "objectives.ra.impl: 'mine' comes with the package tiny-kernels, which is not installed "
        "here; there is auto, eager, chunked, triton" in line
    )


def test_a_run_with_it_is_read_and_exported_without_the_package(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with kernel_package(tmp_path / "installed", mine="tiny_kernel:BY_PRODUCT"):
        run = train(make_config("objectives.ra.impl=mine"))
    config = RunFolder.open(run).config()
    assert config.objectives["ra"].model_dump()["impl"] == "mine@tiny-kernels"
    assert load_training(run / "recipe.yaml") == config
    done = alignlab("export", run, "--out", tmp_path / "exported")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "exported" / "transformer").is_dir()
    probed = alignlab("probe", run)
    assert probed.exit_code == 0, probed.output
    with pytest.raises(UserError) as error:
        train(config.model_copy(update={"name": "again"}))
    told = "objectives.ra: 'mine' comes with the package tiny-kernels, which is not installed here"
    assert str(error.value).startswith(told)
    assert not (tmp_path / "again" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("mien", "unknown value 'mien', did you mean 'mine'? valid: auto, eager, chunked, triton"),
        ("gone", "package tiny-kernels registers kernel 'gone': cannot load no_such_module:X: No"),
        ("3", "expected a text, got 3"),
    ],
)
def test_a_name_that_cannot_be_used_is_one_line(
    impl: str, message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    entries = {"mine": "tiny_kernel:BY_PRODUCT", "gone": "no_such_module:X"}
    with kernel_package(tmp_path / "installed", **entries):
        with pytest.raises(UserError) as error:
            make_config(f"objectives.ra.impl={impl}")
    assert str(error.value).startswith(f"objectives.ra.impl: {message}")


def test_the_implementation_of_another_operation_is_not_offered(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    other = "objectives={vr: {name: videorepa, teacher: dino, blocks: [1], impl: mine}}"
    with kernel_package(tmp_path / "installed", mine="tiny_kernel:BY_PRODUCT"):
        with pytest.raises(UserError, match=r"vr.impl: unknown value 'mine'.*chunked, triton$"):
            make_config(other)


def test_a_run_of_one_that_cannot_run_here_says_why(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with kernel_package(tmp_path / "installed", mine="tiny_kernel:NEEDY"):
        with pytest.raises(UserError) as error:
            train(make_config("objectives.ra.impl=mine"))
    told = "objectives.ra: pull_push: impl='mine@tiny-kernels' cannot run: needs a card"
    assert str(error.value).startswith(told)


def test_doctor_lists_what_packages_register(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    entries = {"mine": "tiny_kernel:BOTH", "needy": "tiny_kernel:NEEDY", "gone": "no_module:X"}
    with kernel_package(tmp_path, **entries):
        print_diagnosis()
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    states = {cells[1].strip(): cells[2].strip() for cells in lines if len(cells) > 3}
    assert states["pull_push, impl=mine"] == states["relation, impl=mine"] == "works"
    assert states["pull_push, impl=needy"] == "needs a card that nobody has"
    assert states["gone (package tiny-kernels)"].startswith(
        "package tiny-kernels registers kernel 'gone': cannot load no_module:X"
    )
