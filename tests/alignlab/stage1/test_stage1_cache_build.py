"""`alignlab cache build` of a Stage 1 recipe: its training then reads everything from the cache."""

from pathlib import Path

import pytest

from alignlab.recipe import load_run, load_stage1_run
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.train import train_stage1
from alignlab.training.cache_build import build_cache, from_text, to_text
from alignlab.training.cache_builder import CacheBuilder
from command_line import alignlab, refused
from loaded_models import TEACHER, TEXT, LoadedModels
from run_contents import timeless_rows

Recipes = dict[str, Path]


def config_of(recipes: Recipes, kind: str, output: Path, *overrides: str) -> Stage1Config:
    return load_stage1_run(kind, recipes[kind], [f"output={output}", *overrides])


@pytest.mark.parametrize("kind", ["sara", "moalign"])
def test_what_is_built_is_all_that_stage_1_reads(
    recipes: Recipes,
    networks: Recipes,
    tmp_path: Path,
    loaded_models: LoadedModels,
    kind: str,
) -> None:
    config = config_of(recipes, kind, tmp_path)
    (built,) = build_cache([config])
    assert (built.clips, built.encoded) == (9, 9) and built.size > 0
    assert build_cache([config])[0].encoded == 0
    loaded_models.counts.clear()
    trained = train_stage1(config_of(recipes, kind, tmp_path, "data.cache.mode=require"))
    assert loaded_models.counts == {TEACHER.__name__: 1}, "for the digest of its weights alone"
    assert timeless_rows(trained.parent) == timeless_rows(networks[kind].parent)


def test_recipes_reach_other_processes_as_they_are(
    recipes: Recipes, recipe_file: Path, tmp_path: Path
) -> None:
    trainings = [config_of(recipes, kind, tmp_path) for kind in recipes]
    assert from_text(to_text([*trainings, load_run(recipe_file)])) == [
        *trainings,
        load_run(recipe_file),
    ]


def test_a_stage_1_training_frees_its_text_encoder(
    recipes: Recipes, tmp_path: Path, loaded_models: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[set[str]]()
    save = "alignlab.stage1.train.save_stage1"
    monkeypatch.setattr(save, lambda *args, **settings: seen.append(loaded_models.alive()))
    for name in ("auto", "keep"):
        train_stage1(
            config_of(recipes, "sara", tmp_path / name, f"model.text_encoder={name}", "steps=1")
        )
    assert [TEXT.__name__ in alive for alive in seen] == [False, True]
    assert loaded_models.counts[TEXT.__name__] == 2


def test_the_command_takes_a_stage_1_recipe(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CacheBuilder, "encode", lambda builder, clip: None)
    result = alignlab("cache", "build", recipes["moalign"], f"output={tmp_path}")
    assert result.exit_code == 0 and f"{tmp_path}/cache: 9 clips" in result.stdout
    line = refused("cache", "build", recipes["moalign"], "data.cache.mode=off")
    assert line.startswith("error: data.cache.mode: off")
