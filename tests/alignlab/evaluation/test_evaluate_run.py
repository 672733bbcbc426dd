"""Checkpoints of a run that are evaluated, sampled from, exported and probed afterwards."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from alignlab.config.parts import EvalConfig
from alignlab.config.run import RunConfig
from alignlab.evaluation.evaluate_run import evaluate_run
from alignlab.evaluation.probe import probe_run
from alignlab.recipe import load_run
from alignlab.runs.metric_rows import evaluations, read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.train import train
from alignlab.training.checkpoint import ModelChoice
from command_line import alignlab, refused
from run_contents import file_contents

COSTS = ("time/step", "memory/peak_mib", "params/extra")


@pytest.fixture(scope="module")
def run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a moving average, evaluated and saved at step 2 as well."""
    output = f"output={tmp_path_factory.mktemp('evaluated')}"
    saved = ("steps=4", "checkpoint.every=2", "eval.every=2", "eval.sample_every=2")
    return train(load_run(recipe_file, [output, *saved, "optim.ema=0.9", "eval.sample_clips=1"]))


def evaluated(run: Path, *arguments: object) -> dict[str, Any]:
    """The JSON that `alignlab evaluate` writes, which it names."""
    result = alignlab("evaluate", run, *arguments)
    assert result.exit_code == 0, result.output
    path = Path(result.stdout.split("evaluation: ")[1].strip())
    content: dict[str, Any] = json.loads(path.read_text()) | {"name": path.name}
    assert f"val/flow │ {content['metrics']['val/flow']:.4g}" in " ".join(result.stdout.split())
    return content


def test_a_checkpoint_is_measured_as_the_run_measured_itself(run: Path) -> None:
    before = file_contents(run)
    newest, second = evaluated(run), evaluated(run, "--checkpoint", 2)
    result = json.loads((run / "result.json").read_text())
    own = {key: value for key, value in result["metrics"].items() if key not in COSTS}
    assert (newest["step"], newest["metrics"], newest["notes"]) == (4, own, result["notes"])
    assert newest["name"] == "step-000004.json" and newest["ema"] is True
    assert second["metrics"] == evaluations(read_rows(run / "metrics.jsonl"))[2]
    assert second["name"] == "step-000002.json"
    after = file_contents(run)
    assert {name: after[name] for name in before} == before
    for folder, samples in (("step-000002", "samples/step-000002"), ("step-000004", "samples")):
        clip = after[f"evaluations/{folder}-samples/0.mp4"]
        assert clip == before[f"{samples}/0.mp4"]


def test_a_moved_run_is_evaluated_with_the_cache_beside_it(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "renamed")
    assert not (tmp_path / "cache").exists()
    evaluate_run(tmp_path / "renamed", generation=False)
    gc.collect()  # what it made is written once nothing has the cache
    assert any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_other_settings_and_weights_are_written_beside_it(run: Path, tmp_path: Path) -> None:
    own = evaluated(run)["metrics"]
    settings = ("eval.blocks=[1]", "eval.sample_clips=0", "eval.sample_every=null")
    found = evaluated(run, *settings[:2])
    assert "cknna/block1" in found["metrics"] and "cknna/block0" not in found["metrics"]
    assert not any(name.startswith("gen/") for name in found["metrics"])
    assert found["metrics"]["val/flow"] == own["val/flow"]
    assert found["eval"]["blocks"] == [1]
    assert found["name"].startswith("step-000004-v2-")
    trained = evaluated(run, "--no-ema", "eval.sample_clips=0", "--out", tmp_path / "a.json")
    assert trained["ema"] is False and trained["metrics"]["val/flow"] != own["val/flow"]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]
    recipe = load_run(run / "recipe.yaml", list(settings), stored=True).eval
    again = evaluate_run(run, evaluation=recipe, generation=False)
    assert again.metrics == found["metrics"]


def test_mistakes_are_one_line(run: Path, full_run: Path, tmp_path: Path) -> None:
    assert f"{run}: no checkpoint of step 3; there are those of steps 2, 4" in refused(
        "evaluate", run, "--checkpoint", 3
    )
    for command in (["sample", run, "--prompt", "a"], ["export", run], ["probe", run]):
        assert "there are those of steps 2, 4" in refused(*command, "--checkpoint", 7)
    for override in ("steps=9", "eval.every=3", "model.path=x"):
        assert f"{override}: an evaluation takes settings of how a run is measured" in refused(
            "evaluate", run, override
        )
    assert "eval.clips: 9 is more than data.val_clips" in refused("evaluate", run, "eval.clips=9")
    assert "keeps no moving average" in refused("evaluate", full_run, "--ema")
    assert "must end in .json" in refused("evaluate", run, "--out", tmp_path / "a.txt")
    assert "no clip is generated" in refused("train", run / "recipe.yaml", "eval.sample_clips=0")


def test_blocks_need_a_teacher(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(aligned=False).model_copy(update={"teachers": {}})
    folder = RunFolder.create(config)
    line = f"eval.blocks: tokens are measured against a teacher, and the recipe of {folder.path} "
    assert line in refused("evaluate", folder.path, "eval.blocks=[2]")


def test_the_model_of_a_checkpoint_is_exported_and_sampled(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    for options, weights in ((("--no-ema",), "transformer"), ((), "ema")):
        command = ["export", run, "--checkpoint", 2, *options, "--out", out / weights]
        assert alignlab(*command).exit_code == 0
        exported = WanTransformer3DModel.from_pretrained(out / weights / "transformer").state_dict()
        folder = run / "checkpoints" / "step-000002"
        if weights == "ema":
            expected = load_file(folder / "ema.safetensors")
        else:
            expected = WanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
        assert all(torch.equal(exported[name], value) for name, value in expected.items())
    clips: list[bytes] = []
    chosen: list[list[object]] = [[], ["--checkpoint", 4], ["--checkpoint", 2]]
    for choice in chosen:
        path = tmp_path / f"{len(clips)}.mp4"
        command = ["sample", run, "--prompt", "a", "--steps", 1, "--out", path, *choice]
        assert alignlab(*command).exit_code == 0
        clips.append(path.read_bytes())
    assert clips[0] == clips[1] != clips[2]


def test_the_model_of_a_checkpoint_is_probed(run: Path) -> None:
    second, newest = probe_run(run, choice=ModelChoice(2)), probe_run(run)
    assert (second.step, newest.step) == (2, 4)
    assert second.sample == run / "samples" / "step-000002" / "0.mp4"
    assert newest.sample == run / "samples" / "0.mp4"
    before, after = (
        [[c for c in probe.cells if c.model == model] for probe in (second, newest)]
        for model in ("before", "after")
    )
    assert before[0] == before[1] and after[0] != after[1]


def test_a_recipe_that_samples_nothing_has_no_cadence_of_it() -> None:
    with pytest.raises(ValueError, match="sample_every: 5: no clip is generated"):
        EvalConfig(sample_every=5, sample_clips=0)
    assert EvalConfig(sample_every=5, sample_clips=0, generated_clips=1).sample_every == 5
