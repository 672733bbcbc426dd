"""Data sets of another package: trained from, cached or not, and wrong ones refused."""

import json
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config.data import CacheConfig
from alignlab.data import registry
from alignlab.data.own import CheckedClips, OwnClips, OwnClipsConfig
from alignlab.data.registry import installed_datasets
from alignlab.data.sample import Sample
from alignlab.dataset_cache.clip_keys import video_key
from alignlab.errors import UserError
from made_packages import TESTS, answers, write_package

EXTERNAL = TESTS / "alignlab" / "external"
RECIPE = """
name: run
steps: 2
model: {{path: {wan}}}
data: {{name: greys, frames: 5, size: [48, 48]}}
teachers:
  dino: {{family: dinov2, path: {teacher}, feature: post_norm}}
objectives:
  ra: {{name: refalign, teacher: dino, blocks: [0]}}
optim: {{batch_size: 2}}
checkpoint: {{every: 1}}
eval: {{clips: 2, sample_clips: 1, sample_steps: 1}}
tracking: {{mlflow: none, log_every: 1}}
"""


@pytest.fixture
def tiny_data(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's module, which no entry point names."""
    monkeypatch.syspath_prepend(EXTERNAL)
    return import_module("tiny_data")


def clips(tiny_data: Any, name: str = "Greys", /, package: str = "p 1.0", **settings: Any) -> Any:
    cls = getattr(tiny_data, name)
    config = cls.Config(frames=5, size=(48, 48), **settings)
    return CheckedClips(cls(config, "train"), package)


def test_what_a_package_gives_is_a_data_set(tiny_data: Any) -> None:
    found = clips(tiny_data)
    assert len(found) == 4 and found.notes == ()
    sample = found[2]
    assert sample.video_THWC.shape == (5, 48, 48, 3) and sample.key == found.key(2) == "train/2"
    assert found.caption(2) == "grey 2" and found.names(2) == ("grey-2",)
    assert torch.equal(found.references(2)[0].image_HWC, sample.references[0].image_HWC)
    assert found.without_masks() == "train/0" and found.entities(0) == ()
    assert found.share_with_references() == 1.0
    assert clips(tiny_data, references=(0, 0)).share_with_references() == 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("sample", "clip 1: is a Tensor, no alignlab.data.sample.Sample"),
        ("frames", "clip 1: has video_THWC (9, 48, 48, 3) in torch.uint8 on cpu, not (5, 48, 48"),
        ("dtype", "clip 1: has video_THWC (5, 48, 48, 3) in torch.float32 on cpu, not (5, 48, 48,"),
        ("references", "clip 1: has 9 references, data.references asks for 0 to 3"),
        ("caption", "clip 1: has caption 'other', and caption(1) gives 'grey 1'"),
        ("masks", "clip 1: has entities ('a grey',), and entities(1) gives ()"),
        ("raises", "clip 1: it raised RuntimeError: the archive is broken (tiny_data.py:"),
        ("origin", "origin of clip 1: own.level: a part is a str, int, float, bool or a tuple"),
        ("empty", "has 0 clips, not one or more"),
        ("first random", "clip 0 has other frames each time it is asked for: the same index must"),
    ],
)
def test_what_is_no_clip_is_told(wrong: str, message: str, tiny_data: Any) -> None:
    with pytest.raises(UserError) as error:
        found = clips(tiny_data, wrong=wrong)
        found[0]
        found[1]
        found.origin(1)
    told = str(error.value)
    assert message in told and "\n" not in told
    assert told.startswith("data greys (p 1.0), split train: ")


@pytest.mark.parametrize("override", ["neither", "names", "references"])
def test_a_clip_is_made_once_each_time_it_is_asked_for(override: str, tiny_data: Any) -> None:
    """Names that are those of the clip itself are not compared with it; others are."""
    made: list[int] = []

    class Counted(tiny_data.Greys):
        names, references = OwnClips.names, OwnClips.references

        def __getitem__(self, index: int) -> Sample:
            made.append(index)
            shown = tiny_data.Greys.references(self, index)
            blank = torch.zeros(5, 48, 48, 3, dtype=torch.uint8)
            return Sample(self.key(index), blank, self.caption(index), shown)

    if override != "neither":
        setattr(Counted, override, lambda self, index: ())
    config = tiny_data.GreysConfig(frames=5, size=(48, 48))
    if override != "neither":
        with pytest.raises(UserError, match=r"has references of other names than names\(0\) gives"):
            CheckedClips(Counted(config, "train"), "p 1.0")
        return
    found = CheckedClips(Counted(config, "train"), "p 1.0")
    made.clear()
    assert found[2].references[0].name == "grey-2" and made == [2]
    assert found.names(2) == ("grey-2",)


def test_equal_origins_have_equal_pixels(tiny_data: Any) -> None:
    def key(index: int = 0, **settings: Any) -> str:
        return video_key(clips(tiny_data, **settings).origin(index), {}).digest

    first = key()
    assert key(cache=CacheConfig(mode="read"), workers=1) == first
    others = [key(1), key(package="p 1.1"), key(fps=4), key(clips=3), key(wrong="user2")]
    assert len({first, *others}) == 6


def test_clips_without_an_origin_are_in_no_cache(tiny_data: Any) -> None:
    config = tiny_data.UncachedConfig()
    assert not config.cache.latents and not config.cache.teachers and config.cache.texts
    found = clips(tiny_data, "Uncached")
    assert "the dataset cache keeps captions alone" in found.notes[0]
    assert found.origin(0) != found.origin(1)
    given: Mapping[str, Any]
    for given in ({"latents": True}, {"teachers": True}, {"mode": "require"}):
        with pytest.raises(ValueError, match="do not say what they are made from; remove it"):
            tiny_data.UncachedConfig(cache=given)
    assert tiny_data.UncachedConfig(cache={"mode": "off"}).cache.mode == "off"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shapes", "tiny_data:Greys", "alignlab has that name already"),
        ("a:b", "tiny_data:Greys", "a name is made of letters, digits, _ and -"),
        ("greys", "no_such_module:X", "cannot load no_such_module:X: No module named"),
        ("greys", "tiny_data:Nothing", "cannot load tiny_data:Nothing: module 'tiny_data' has no"),
        ("greys", "tiny_data:function", "is no class derived from alignlab.data.own.OwnClips"),
        ("greys", "tiny_data:NoCaption", "tiny_data:NoCaption lacks caption"),
        ("greys", "tiny_data:NoConfig", "has no Config derived from alignlab.data.own.OwnClipsC"),
        ("greys", "tiny_data:NoOrigin", "says nothing of what its clips are made from"),
        ("uncached", "tiny_data:TwoMinds", "has an origin, and a Config with clips_are_cached = F"),
        ("other", "tiny_data:Greys", 'has a Config without the line: name: Literal["other"]'),
    ],
)
def test_a_bad_data_set_is_a_line(
    name: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(EXTERNAL / "tiny_data.py", tmp_path)
    write_package(tmp_path, "bad-package", "alignlab.data", **{name: value})
    monkeypatch.syspath_prepend(tmp_path)
    installed_datasets.cache_clear()
    try:
        (found,) = installed_datasets()
        rows = registry._refuse_unusable({"name": "shapes"})
        if name not in ("shapes", "a:b"):
            with pytest.raises(ValueError, match=r"^package bad-package registers data set"):
                registry._refuse_unusable({"name": name})
    finally:
        installed_datasets.cache_clear()
    assert rows == {"name": "shapes"} and found.row is None and found.problem is not None
    assert found.problem.startswith(f"package bad-package registers data set {name!r}: ")
    assert message in found.problem and "\n" not in found.problem


def test_own_settings_are_those_of_every_data_set() -> None:
    ours = set(registry.BUILT_IN["folder"].config.model_fields)
    assert set(OwnClipsConfig.model_fields) <= ours


def test_recipes_name_it_and_runs_train_from_it(
    wan_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    installed, output = tmp_path / "installed", tmp_path / "output"
    for folder in (installed, output):
        folder.mkdir()
    shutil.copy(EXTERNAL / "tiny_data.py", installed)
    entries = {"greys": "tiny_data:Greys", "uncached": "tiny_data:Uncached", "gone": "no_module:X"}
    write_package(installed, "tiny-data", "alignlab.data", **entries)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(wan=wan_folder, teacher=teacher_folder))
    (output / "read.txt").touch()
    level = tmp_path / "level.txt"
    level.write_text("30")

    def train(name: str, *overrides: str) -> tuple[str, ...]:
        return ("train", str(recipe), f"output={output}", f"name={name}", *overrides)

    cold, warm, listed, doctor, key, gone, of_file, wrong, uncached, required = answers(
        installed,
        train("cold"),
        train("warm", "data.cache.mode=require", "eval.sample_clips=0"),
        ("list", "data"),
        ("doctor",),
        train("x", "data.clipz=3"),
        train("x", "data.name=gone"),
        train("of-file", f"data.level_file={level}"),
        train("x", "data.wrong=first raises"),
        train("uncached", "data.name=uncached"),
        train("x", "data.name=uncached", "data.cache.mode=require"),
        cwd=output,
    )
    for done in (cold, warm, of_file, uncached, listed, doctor):
        assert done.code == 0, done.stderr
    log = [(output / name / "metrics.jsonl").read_text() for name in ("cold", "warm")]
    losses = [[json.loads(line).get("loss/total") for line in text.splitlines()] for text in log]
    assert losses[0] == losses[1] and None not in losses[0][1:3]
    assert "Size of either split." in listed.stdout and "greys" in listed.stdout
    assert "greys (package tiny-data 1.0)" in doctor.stdout
    assert "gone (package tiny-data 1.0)" in doctor.stdout
    assert "data.clipz: unknown key 'clipz', did you mean 'clips'?" in key.stderr
    told = "package tiny-data registers data set 'gone': cannot load no_module:X: No module named"
    assert gone.code == 2 and gone.stderr.startswith(f"error: data: {told}")
    inputs = json.loads((output / "of-file" / "inputs.json").read_text())["inputs"]
    (data,) = [one for one in inputs if one["name"] == "data"]
    assert set(data["files"]) == {"level.txt", "package tiny-data 1.0"}
    told = "clip 0: it raised RuntimeError: the archive is broken (tiny_data.py:"
    assert wrong.code == 2 and wrong.stderr.count("\n") == 1 and told in wrong.stderr
    notes = json.loads((output / "uncached" / "result.json").read_text())["notes"]
    assert any("the dataset cache keeps captions alone" in note for note in notes)
    assert required.code == 2 and "cache.mode: require" in required.stderr
    read = (output / "read.txt").read_text().split()
    assert read.count("train/3") < read.count("train/0")

    level.write_text("31")
    info = next(installed.glob("*.dist-info"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.1\n")
    changed, newer = answers(
        installed, train("of-file", f"data.level_file={level}"), train("cold"), cwd=output
    )
    told = "data changed since this run began"
    assert changed.code == newer.code == 2
    assert told in changed.stderr and "level.txt" in changed.stderr
    assert f"{told} (package tiny-data 1.0 is gone, package tiny-data 1.1 is new)" in newer.stderr
