"""A run that starts from another run's weights and projectors."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.recipe import load_run
from alignlab.runs.checkpoint_folders import prune
from alignlab.runs.init_source import SETTING, init_source
from alignlab.runs.input_record import InputRecord, started_from
from alignlab.runs.kept_checkpoints import keep_weights_of
from alignlab.runs.metric_rows import read_rows
from alignlab.train import RunTrainer, train
from alignlab.training import checkpoint
from alignlab.training.batches import Batch
from alignlab.training.init_from import check_fits, checked_source
from alignlab.training.micro_batches import MicroBatches
from alignlab.training.setup import build_run
from kills import Killed
from run_contents import file_contents
from tiny_runs import MakeConfig, TrainUntil

pytestmark = pytest.mark.usefixtures("shared_clips")

REPA = "objectives.p={name: repa, teacher: dino, blocks: [1], projector_dim: 16}"
LORA = ("model.train=lora", "model.lora.rank=4", "model.lora.alpha=8")
SMALL = ("eval.clips=1", "optim.batch_size=1", "checkpoint.every=1")


@pytest.fixture(scope="module")
def source(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with projectors and a moving average; not to be changed."""
    output = tmp_path_factory.mktemp("source")
    return train(load_run(recipe_file, [f"output={output}", REPA, *SMALL, "optim.ema=0.9"]))


def first_loss(config: RunConfig, newest: Path) -> float:
    """Loss of the first batch of a run with the state of a checkpoint."""
    run = build_run(config)
    checkpoint.restore_weights(run.state, newest)
    run.state.step = 0
    trainer = RunTrainer(run)
    with run.branch:
        return float(trainer.step(trainer.micro_batches())["loss/total"])


def test_it_starts_where_the_other_run_ended(make_config: MakeConfig, source: Path) -> None:
    """Weights, not their average; projectors; step 0; and it is the same resumed."""
    settings = (REPA, *SMALL, "optim.ema=0.9")
    config = make_config(*settings, f"model.init_from={source}")
    run = train(config)
    rows = [row for row in read_rows(run / "metrics.jsonl") if "lr" in row]
    assert [row["step"] for row in rows] == [1, 2]
    newest = source / "checkpoints" / "step-000002"
    assert rows[0]["loss/total"] == first_loss(make_config(*settings), newest)
    plain = first_loss(make_config(*settings), source / "checkpoints" / "step-000001")
    assert rows[0]["loss/total"] != plain
    record = json.loads((run / "inputs.json").read_text())
    (entry,) = (one for one in record["inputs"] if one["name"] == "model.init_from")
    assert "objectives.safetensors" in entry["files"] and "ema.safetensors" not in entry["files"]


def test_it_starts_from_a_copy_of_weights_as_from_its_checkpoint(
    make_config: MakeConfig, source: Path, tmp_path: Path
) -> None:
    """Of a run that has kept no checkpoint of that step; the copy is known as such later."""
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    first = copy / "checkpoints" / "step-000001"
    keep_weights_of(first)
    shutil.rmtree(first)
    named = first.with_name("weights-000001")
    config = make_config(REPA, *SMALL, "steps=1", f"model.init_from={named}")
    run = train(config)
    rows = [row for row in read_rows(run / "metrics.jsonl") if "lr" in row]
    there = source / "checkpoints" / "step-000001"
    assert rows[0]["loss/total"] == first_loss(make_config(REPA, *SMALL), there)
    recorded = InputRecord(run, config.output).inputs[SETTING, str(named)]
    assert recorded.checkpoint == named.name and started_from(recorded) == named
    shutil.rmtree(named)
    with pytest.raises(UserError, match=f"{named}: no checkpoint of a run"):
        init_source(config)


def test_a_source_that_trains_keeps_the_checkpoint_until_it_is_read(
    make_config: MakeConfig, source: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    first = copy / "checkpoints" / "step-000001"
    config = make_config(REPA, *SMALL, f"model.init_from={first}")
    with ExitStack() as locks:
        checked_source(config, locks)
        prune(copy / "checkpoints", 1)
        assert first.exists()
    prune(copy / "checkpoints", 1)
    assert not first.exists()


def test_the_average_begins_at_the_weights_that_it_starts_from(
    make_config: MakeConfig, source: Path, train_until: TrainUntil
) -> None:
    config = make_config(REPA, *SMALL, "optim.ema=0.9", f"model.init_from={source}")
    seen: dict[str, torch.Tensor] = {}

    class Seen(RunTrainer):
        def micro_batches(self, step: int | None = None) -> MicroBatches[Batch]:
            seen.update({k: v.clone() for k, v in (self.run.state.ema or {}).items()})
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("alignlab.train.RunTrainer", Seen)
        train(config)
    run = build_run(config)
    checkpoint.load_transformer(run.wan.transformer, source / "checkpoints" / "step-000002")
    weights = dict(run.wan.transformer.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in seen.items()) and seen


def test_a_source_that_changed_is_refused(
    make_config: MakeConfig, source: Path, train_until: TrainUntil, tmp_path: Path
) -> None:
    """And one that is gone is not missed: the run has its own weights by then."""
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    config = make_config(REPA, *SMALL, f"model.init_from={copy}")
    train_until(config, 1)
    weights = next((copy / "checkpoints" / "step-000002" / "transformer").glob("*.safetensors"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.init_from changed since this run began"):
        train(config)
    shutil.rmtree(copy)
    assert json.loads((train(config) / "result.json").read_text())["steps"] == 2


def test_projectors_that_do_not_fit_begin_anew_and_are_named(
    make_config: MakeConfig, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = REPA.replace("16", "8")
    config = make_config(other, *SMALL, f"model.init_from={source}", "objectives.ra=null")
    run = train(config)
    notes = json.loads((run / "result.json").read_text())["notes"]
    told = "model.init_from: projectors that begin anew: p (of another shape there)"
    assert told in notes and told in caplog.text
    assert f"model.init_from: objectives of {source} that are not continued: ra" in notes


def test_a_lora_goes_on_as_a_lora_and_not_as_a_model(
    make_config: MakeConfig, lora_run: Path, source: Path
) -> None:
    run = train(make_config(*LORA, *SMALL, f"model.init_from={lora_run}"))
    rows = [row for row in read_rows(run / "metrics.jsonl") if "lr" in row]
    newest = lora_run / "checkpoints" / "step-000002"
    assert rows[0]["loss/total"] == first_loss(make_config(*LORA, *SMALL), newest)
    refusals = {
        (f"model.init_from={lora_run}",): "trained a LoRA, this run trains all weights",
        (*LORA, f"model.init_from={source}"): "trained all weights, this run trains a LoRA",
        (*LORA[:1], "model.lora.rank=2", f"model.init_from={lora_run}"): "they must be equal",
    }
    for number, (settings, expected) in enumerate(refusals.items()):
        with pytest.raises(UserError, match=expected):
            train(make_config(f"name=other{number}", *SMALL, *settings))


def test_the_refusal_says_how_a_model_comes_of_a_lora(make_config: MakeConfig) -> None:
    """Its export is an adapter, which is no `model.path`."""
    whole, lora = make_config(), make_config(*LORA)
    with pytest.raises(UserError, match=r"fuse the adapter into its model .*fuse_lora"):
        check_fits(whole, lora, Path("runs/lora"))
    with pytest.raises(UserError, match="or export the run and name the folder as model"):
        check_fits(lora, whole, Path("runs/whole"))


def test_a_lora_of_another_depth_is_refused(
    make_config: MakeConfig, lora_run: Path, tmp_path: Path
) -> None:
    """What it lacks would stay as it was drawn."""
    newest = lora_run / "checkpoints" / "step-000002"
    layers = load_file(newest / checkpoint.LORA_FILE)
    transformer = build_run(make_config(*LORA)).wan.transformer
    checkpoint.load_transformer(transformer, newest)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    kept = {name: value for name, value in layers.items() if "blocks.0." not in name}
    deeper = layers | {"transformer.blocks.9.x": torch.zeros(1)}
    for number, other in enumerate((kept, deeper)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(other, folder / checkpoint.LORA_FILE)
        with pytest.raises(UserError, match=r"its LoRA does not fit .+ e\.g\. blocks"):
            checkpoint.load_transformer(transformer, folder)
    after = transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_is_no_finished_run_or_checkpoint_is_refused(
    make_config: MakeConfig, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(source, unfinished)
    (unfinished / "result.json").unlink()
    step = unfinished / "checkpoints" / "step-000001"
    found = init_source(make_config(f"model.init_from={step}"))
    assert found is not None and found.checkpoint == step
    monkeypatch.chdir(step.parent)
    found = init_source(make_config("model.init_from=step-000001"))
    assert found is not None and found.run.path == unfinished
    for named, expected in {
        unfinished: "is not finished, so its newest checkpoint is not its last",
        tmp_path: "is a folder with runs in it, not a run: name one of its runs",
        step.with_name("step-000007"): "no checkpoint of a run",
        tmp_path / "run": "no run folder",
    }.items():
        with pytest.raises(UserError, match=expected):
            init_source(make_config(f"model.init_from={named}"))
    assert file_contents(source)  # untouched
