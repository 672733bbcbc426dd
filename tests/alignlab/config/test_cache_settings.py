"""`data.cache`: what it replaces, what of it is part of a run, what is refused."""

import logging
from pathlib import Path

import pytest

import alignlab.experiments
from alignlab.config.data import CacheConfig
from alignlab.config.run import RunConfig
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.errors import UserError
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.fairness import check_fair, differences
from alignlab.recipe import dump, load_run, recipe_hash

LOSSY = "data.cache.dtype=bf16"


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as info:
        load_run("tiny", list(overrides))
    assert "\n" not in str(info.value)
    return str(info.value)


def test_a_recipe_that_counts_clips_is_told_once_that_nothing_reads_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "alignlab"):
        for count in (3, 5):
            config = load_run("tiny", [f"data.cache_clips={count}"])
            assert recipe_hash(config) == recipe_hash(load_run("tiny"))
            assert "cache_clips" not in dump(config)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("data.cache_clips: nothing reads it any more; data.cache took its place")


def test_best_settings_of_an_older_sweep_are_a_recipe() -> None:
    load_run(Path(alignlab.experiments.__file__).parent / "results/sweep_refalign/best.yaml")


def test_a_run_that_counted_clips_is_the_same_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = tmp_path / "recipe.yaml"
    text = dump(load_run("tiny"))
    written.write_text(text.replace("  name: shapes\n", "  name: shapes\n  cache_clips: 7\n"))
    assert "cache_clips" in written.read_text()
    with caplog.at_level(logging.WARNING, "alignlab"):
        assert load_run(written, stored=True) == load_run("tiny")
    assert not caplog.records


@pytest.mark.parametrize("mode", ["off", "read", "write", "require"])
def test_modes_survive_yaml(tmp_path: Path, mode: str) -> None:
    written = tmp_path / "recipe.yaml"
    written.write_text(dump(load_run("tiny")))
    text = written.read_text()
    written.write_text(text.replace("    mode: write\n", f"    mode: {mode}\n"))
    for config in (load_run(written), load_run("tiny", [f"data.cache.mode={mode}"])):
        assert config.data.cache.mode == mode
        written.write_text(dump(config))
        assert load_run(written).data.cache.mode == mode


def test_only_the_dtype_is_part_of_a_run() -> None:
    plain = recipe_hash(load_run("tiny"))
    numberless = ["mode=require", "path=x", "texts=false", "latents=false", "teachers=false"]
    assert recipe_hash(load_run("tiny", [f"data.cache.{one}" for one in numberless])) == plain
    assert recipe_hash(load_run("tiny", ["data.cache.dtype=fp32"])) == plain
    assert len({plain, *(recipe_hash(load_run("tiny", [f"data.cache.dtype={d}"]))
                         for d in ("bf16", "fp8", "int8"))}) == 4  # fmt: skip


@pytest.mark.parametrize("unread", ["mode=off", "teachers=false"])
def test_a_dtype_that_nothing_reads_is_refused(unread: str) -> None:
    assert "dtype: nothing reads bf16 with" in refused(LOSSY, f"data.cache.{unread}")


def test_variants_are_measured_through_one_dtype(recipe_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "fair.yaml"
    variants = "\nbaseline: a\nseeds: [0]\nvariants:\n  a: {}\n  b: {%s}\n"

    def variant(changes: str) -> None:
        path.write_text(recipe_file.read_text() + variants % changes)

    variant("data.cache.mode: read, data.cache.path: elsewhere")
    check_fair(load_compare(path))
    assert differences(load_compare(path)) == {}
    variant("data.cache.dtype: bf16")
    assert differences(load_compare(path)) == {"data.cache.dtype": {"a": "fp32", "b": "bf16"}}
    with pytest.raises(UserError, match=r"data\.cache\.dtype: variants are measured differently"):
        check_fair(load_compare(path))


def test_models_are_plain_data() -> None:
    config = load_run("tiny", [LOSSY])
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_run_named_cache_is_read_and_is_no_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    assert "writes into 'cache'" in refused("name=cache")
    text = dump(load_run("tiny", ["name=x"])).replace("name: x\n", "name: cache\n")
    (folder / "recipe.yaml").write_text(text)
    config = load_run(folder / "recipe.yaml", stored=True)
    assert config.name == "cache"
    with pytest.raises(UserError, match=r"cache holds recipe\.yaml of a run.*data\.cache\.path"):
        EncodedValues.of(config.data.cache, str(tmp_path))
    EncodedValues.of(CacheConfig(mode="off"), str(tmp_path))
    folder.rename(tmp_path / "other")
    EncodedValues.of(config.data.cache, str(tmp_path))
