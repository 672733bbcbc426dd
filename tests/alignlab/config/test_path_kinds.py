"""One line for the wrong kind of thing: what it is, and the command or setting that takes it."""

from pathlib import Path

import pytest

from alignlab.config.path_kinds import kind_of
from alignlab.config.recipe_file import read_recipe
from alignlab.errors import UserError
from alignlab.recipe import load_run
from alignlab.runs.init_source import init_source
from alignlab.runs.run_folder import RunFolder
from command_line import refused


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """Empty files and folders with the names of what alignlab writes."""
    for name in (
        "one/recipe.yaml",
        "one/metrics.jsonl",
        "one/checkpoints/step-000500/log.json",
        "one/checkpoints/weights-000250/log.json",
        "one/export/model_index.json",
        "one/stage1/stage1.json",
        "lora/pytorch_lora_weights.safetensors",
        "cmp/comparison.json",
        "cmp/report.html",
        "cmp/none/seed-0/recipe.yaml",
        "swp/study.db",
        "swp/best.yaml",
        "swp/trial-0/seed-0/recipe.yaml",
        "began/progress.json",
        "other/notes.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("name: one\n" if path.suffix == ".yaml" else "")
    return tmp_path


AS_A_RECIPE = {
    "one": "the folder of a run, not a recipe: its recipe is {0}/one/recipe.yaml",
    "one/metrics.jsonl": "the log of a run, not a recipe: its recipe is {0}/one/recipe.yaml",
    "one/checkpoints/step-000500": "a checkpoint, not a recipe: its run's recipe is "
    "{0}/one/recipe.yaml; another run starts from it by "
    "model.init_from={0}/one/checkpoints/step-000500",
    "one/checkpoints/weights-000250": "a checkpoint, not a recipe: its run's recipe is "
    "{0}/one/recipe.yaml; another run starts from it by "
    "model.init_from={0}/one/checkpoints/weights-000250",
    "one/export": "an exported model or a diffusers pipeline, not a recipe: a recipe starts from "
    "it by model.path={0}/one/export",
    "one/stage1": "a Stage 1 network, not a recipe: a recipe reads it by an objective's setting, "
    "such as objectives.ALIAS.aligner={0}/one/stage1",
    "lora": "an exported LoRA, not a recipe: diffusers loads it by pipeline.load_lora_weights",
    "cmp": "the folder of a comparison, not a recipe: name the recipe that made it; "
    "`alignlab verify {0}/cmp` checks its files",
    "cmp/report.html": "the report of a comparison, not a recipe: name the recipe that made it; "
    "`alignlab verify {0}/cmp` checks its files",
    "swp": "the folder of a sweep, not a recipe: the recipe of its best trial is {0}/swp/best.yaml",
    "other": "a folder, not a recipe: name a YAML file",
    ".": "a folder with runs in it, not a recipe: name the recipe.yaml in one of them",
}

AS_A_RUN = {
    "one/recipe.yaml": "the recipe of a run, not its folder: name {0}/one",
    "one/metrics.jsonl": "the log of a run, not a run: name {0}/one",
    "one/checkpoints/step-000500": "a checkpoint, not a run: name {0}/one, with --checkpoint 500 "
    "where the command has it",
    "one/checkpoints/weights-000250": "a checkpoint, not a run: name {0}/one, with --checkpoint "
    "250 where the command has it",
    "one/export": "an exported model or a diffusers pipeline, not a run: a recipe starts from it "
    "by model.path={0}/one/export",
    "one/stage1": "a Stage 1 network, not a run: a recipe reads it by an objective's setting, such "
    "as objectives.ALIAS.aligner={0}/one/stage1",
    "lora": "an exported LoRA, not a run: diffusers loads it by pipeline.load_lora_weights",
    "cmp": "the folder of a comparison, not a run: name one of its runs, such as "
    "{0}/cmp/none/seed-0",
    "cmp/report.html": "the report of a comparison, not a run: name one of its runs, such as "
    "{0}/cmp/none/seed-0",
    "swp": "the folder of a sweep, not a run: name one of its runs, such as {0}/swp/trial-0/seed-0",
    "swp/best.yaml": "a recipe, not a run: `alignlab train {0}/swp/best.yaml` makes the run",
    "began": "the folder of a comparison, not a run: it holds no run",
    ".": "a folder with runs in it, not a run: name one of its runs, such as {0}/one",
}


@pytest.mark.parametrize("name", AS_A_RECIPE)
def test_what_is_no_recipe_says_what_it_is(things: Path, name: str) -> None:
    path = things / name
    with pytest.raises(UserError) as error:
        read_recipe(path, [])
    assert str(error.value) == f"{path} is {AS_A_RECIPE[name].format(things)}"


@pytest.mark.parametrize("name", AS_A_RUN)
def test_what_is_no_run_says_what_it_is(things: Path, name: str) -> None:
    path = things / name
    with pytest.raises(UserError) as error:
        RunFolder.open(path)
    assert str(error.value) == f"{path} is {AS_A_RUN[name].format(things)}"


def test_the_name_of_a_recipe_is_no_run() -> None:
    with pytest.raises(UserError, match=r"^demo is a recipe, not a run: `alignlab train demo`"):
        RunFolder.open(Path("demo"))


def test_a_shipped_recipe_is_found_beside_a_folder_of_its_name(
    things: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    (things / "cmp").rename(things / "demo")
    assert read_recipe("demo", [])["name"] == "demo"


def test_what_alignlab_did_not_write_is_of_no_kind(things: Path) -> None:
    assert kind_of(things / "other") is None
    assert kind_of(things / "other" / "notes.txt") is None
    assert kind_of(things / "nothing") is None


def test_the_command_line_says_it_in_one_line(things: Path) -> None:
    assert "is the folder of a comparison, not a recipe" in refused("train", things / "cmp")
    assert "is the folder of a sweep, not a run" in refused("export", things / "swp")


AS_A_FOLDER = {
    "one/recipe.yaml": "a recipe, not a folder: name {0}/one",
    "swp/best.yaml": "a recipe, not a folder: name the folder that its command wrote: OUTPUT/NAME, "
    "as the recipe says them",
    "one/metrics.jsonl": "the log of a run, not its folder: name {0}/one",
    "cmp/report.html": "the report of a comparison, not its folder: name {0}/cmp",
    "one/checkpoints/step-000500": "a checkpoint, not the folder of its run: name {0}/one",
    "other/notes.txt": "a file, not a folder",
}


@pytest.mark.parametrize("command", ["verify", "track"])
@pytest.mark.parametrize("name", AS_A_FOLDER)
def test_what_is_no_folder_of_runs_says_what_it_is(things: Path, name: str, command: str) -> None:
    path = things / name
    assert refused(command, path) == f"error: {path} is {AS_A_FOLDER[name].format(things)}\n"


def test_what_a_run_cannot_start_from_says_what_it_is(things: Path) -> None:
    config = load_run("tiny", [f"model.init_from={things / 'cmp'}"])
    with pytest.raises(UserError) as error:
        init_source(config)
    said = AS_A_RUN["cmp"].format(things)
    assert str(error.value) == f"model.init_from: {things / 'cmp'} is {said}"
