"""Settings of how batches are made: no part of what a run is; what nothing reads is refused."""

from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.fairness import check_fair, differences
from alignlab.recipe import dump, load_run, load_stage1_run, recipe_hash
from alignlab.training.setup import encoding_settings

AHEAD = ("data.workers=2", "data.prefetch=5")


def test_how_batches_are_made_is_no_part_of_a_run() -> None:
    plain, ahead = load_run("tiny"), load_run("tiny", list(AHEAD))
    assert (ahead.data.workers, ahead.data.prefetch) == (2, 5)
    assert recipe_hash(ahead) == recipe_hash(plain)
    assert encoding_settings(ahead) == encoding_settings(plain)
    other = load_run("tiny", ["data.seed=1"])
    assert encoding_settings(other) != encoding_settings(plain)
    elsewhere = load_run("tiny", ["model.text_encoder=cpu"])
    assert encoding_settings(elsewhere) != encoding_settings(plain)


def test_a_recipe_of_an_older_version_is_read(tmp_path: Path) -> None:
    written = tmp_path / "recipe.yaml"
    text = dump(load_run("tiny"))
    assert text.count("  workers: 0\n") == text.count("  prefetch: null\n") == 1
    written.write_text(text.replace("  workers: 0\n", "").replace("  prefetch: null\n", ""))
    assert load_run(written, stored=True) == load_run("tiny")


def test_variants_may_make_their_batches_in_different_ways(
    recipe_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "fair.yaml"
    variants = "\nbaseline: a\nseeds: [0]\nvariants:\n  a: {}\n"
    variants += "  b: {data.workers: 1, model.text_encoder: keep}\n"
    path.write_text(recipe_file.read_text() + variants)
    check_fair(load_compare(path))
    assert differences(load_compare(path)) == {}


@pytest.mark.parametrize("workers", [(), ("data.workers=0",)])
def test_a_number_of_batches_that_nothing_reads_is_refused(workers: tuple[str, ...]) -> None:
    for load in (
        lambda settings: load_run("tiny", settings),
        lambda settings: load_stage1_run("sara", "stage1_sara", settings),
    ):
        with pytest.raises(UserError, match=r"^data\.?.*prefetch: nothing reads 3 without threads"):
            load(["data.prefetch=3", *workers])


def test_an_attention_backend_of_the_whole_process_and_threads_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.workers: model\.attention=_native_math chooses"):
        load_run("tiny", ["model.attention=_native_math", "data.workers=1"])
    load_run("tiny", ["model.attention=_native_math"])


def test_threads_without_work_are_refused() -> None:
    with pytest.raises(UserError, match="workers: 4 threads, and prefetch: 2"):
        load_run("tiny", ["data.workers=4", "data.prefetch=2"])
    for wrong in ("data.workers=-1", "data.workers=1000", "data.prefetch=0"):
        with pytest.raises(UserError, match=wrong.split("=")[0]):
            load_run("tiny", [wrong])
