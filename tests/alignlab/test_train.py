"""The training loop: what is the same for every variant, what is logged, what stops it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.losses.objective import Features
from alignlab.runs.checkpoint_folders import latest
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder, only_writer
from alignlab.train import train
from alignlab.training.optim import lr_scale
from alignlab.training.setup import build_run
from alignlab.training.teacher_features import teacher_features

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]

REPA = ("objectives.repa.name=repa", "objectives.repa.teacher=dino", "objectives.repa.blocks=[3]")
# REPA's own projector is 2048 wide: too slow for a test
REPA_SMALL = (*REPA, "objectives.repa.projector_dim=32")


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = latest(run / "checkpoints")
    assert newest is not None
    return load_file(newest / "transformer" / "diffusion_pytorch_model.safetensors")


def metrics(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "result.json").read_text())["metrics"]
    return found


def column(run: Path, key: str) -> list[float]:
    return [row[key] for row in read_rows(run / "metrics.jsonl") if key in row]


def losses(run: Path) -> list[float]:
    return column(run, "loss/total")


def test_variants_start_from_the_same_weights(make_config: MakeConfig, wan_folder: Path) -> None:
    stored = load_file(wan_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for config in (make_config(aligned=False), make_config(), make_config(*REPA_SMALL, "seed=1")):
        start = build_run(config).state.transformer.state_dict()
        assert start.keys() == stored.keys()
        assert all(torch.equal(start[name], stored[name]) for name in stored)


def test_projectors_depend_on_seed_and_alias_alone(make_config: MakeConfig) -> None:
    alone = build_run(make_config()).alignment.state_dict()
    beside = build_run(make_config(*REPA_SMALL)).alignment.state_dict()
    other = build_run(make_config("seed=1")).alignment.state_dict()
    for name, value in alone.items():
        assert torch.equal(value, beside[name])
        assert not torch.equal(value, other[name])


def test_accumulation_changes_no_number(make_config: MakeConfig) -> None:
    # half of the samples lose their references, so that rounds differ in what they average
    shared = ["optim.batch_size=4", "optim.lr=1e-4", "flow.reference_dropout=0.5"]
    whole = train(make_config(*shared))
    split = train(make_config(*shared, "optim.accumulate=4", "name=split"))
    for key in ("loss/total", "loss/ra/push", "sim/ra"):
        assert column(split, key) == pytest.approx(column(whole, key), rel=1e-5)
    # the optimizer would hide a gradient of the wrong size
    assert column(split, "grad/norm") == pytest.approx(column(whole, "grad/norm"), rel=1e-4)
    one, two = weights(whole), weights(split)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_batches_that_cannot_be_spread_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"optim\.accumulate"):
        make_config("optim.batch_size=3", "optim.accumulate=2")


def test_gradient_checkpointing_changes_no_loss(make_config: MakeConfig) -> None:
    plain = train(make_config(*REPA_SMALL))
    lean = train(make_config(*REPA_SMALL, "model.gradient_checkpointing=true", "name=lean"))
    assert losses(lean) == losses(plain)
    one, two = weights(plain), weights(lean)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("lora", [False, True])
def test_bf16_follows_fp32_and_keeps_fp32_weights(make_config: MakeConfig, lora: bool) -> None:
    how = ["model.train=lora", "model.lora.rank=4"] if lora else []
    how += [*REPA_SMALL, "eval.sample_clips=1"]
    exact = train(make_config(*how))
    rounded = train(make_config(*how, "model.precision=bf16", "name=bf16"))
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.03)
    assert losses(rounded) != losses(exact)
    newest = latest(rounded / "checkpoints")
    assert newest is not None
    files = ["objectives.safetensors", "optimizer.safetensors"]
    files += [path.relative_to(newest).as_posix() for path in newest.rglob("*.safetensors")]
    for file in files:
        assert all(value.dtype == torch.float32 for value in load_file(newest / file).values())


def test_training_lowers_the_loss_and_moves_everything(make_config: MakeConfig) -> None:
    config = make_config(
        "steps=30", "data.train_clips=1", "flow.sampler=uniform", "optim.lr=2e-3", *REPA_SMALL
    )
    start = {k: v.clone() for k, v in build_run(config).state.transformer.state_dict().items()}
    path = train(config)
    found = losses(path)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    still = [name for name, value in weights(path).items() if torch.equal(value, start[name])]
    assert still == []
    rows = [row for row in read_rows(path / "metrics.jsonl") if "sim/repa" in row]
    assert rows[-1]["sim/repa"] > rows[0]["sim/repa"] + 0.1


def test_moving_average_is_kept_and_evaluated(make_config: MakeConfig) -> None:
    every = ["steps=3", "checkpoint.every=1", "checkpoint.keep=9", "optim.lr=1e-2"]
    plain = train(make_config(*every))
    averaged = train(make_config(*every, "optim.ema=0.5", "name=ema"))
    assert losses(averaged) == losses(plain)
    start = build_run(make_config()).state.transformer.state_dict()
    expected = {name: value.clone() for name, value in start.items()}
    for step in (1, 2, 3):
        folder = averaged / "checkpoints" / f"step-{step:06d}"
        trained = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        for name, value in load_file(folder / "ema.safetensors").items():
            expected[name] = 0.5 * expected[name] + 0.5 * trained[name]
            torch.testing.assert_close(value, expected[name])
    # the same weights, averaged or not, would give the same validation loss
    assert abs(metrics(averaged)["val/flow"] / metrics(plain)["val/flow"] - 1) > 1e-4
    slow = train(make_config(*every, "optim.ema=0.999999", "name=slow"))
    untrained = train(make_config("steps=1", "optim.lr=1e-9", "name=untrained"))
    assert metrics(slow)["val/flow"] == pytest.approx(metrics(untrained)["val/flow"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), [1, 1, 1, 1, 1, 1]),
        (("optim.warmup=3",), [1 / 3, 2 / 3, 1, 1, 1, 1]),
        (("optim.schedule=linear",), [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (("optim.schedule=linear", "optim.warmup=2"), [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        (("optim.schedule=cosine",), [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_learning_rate_schedules(
    make_config: MakeConfig, settings: tuple[str, ...], expected: list[float]
) -> None:
    config = make_config("steps=6", *settings)
    assert [lr_scale(config, step, config.steps) for step in range(6)] == pytest.approx(expected)


def test_the_learning_rate_of_the_log_is_the_one_used(make_config: MakeConfig) -> None:
    path = train(make_config("steps=3", "optim.warmup=2", "optim.schedule=linear"))
    rates = [row["lr"] for row in read_rows(path / "metrics.jsonl") if "lr" in row]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])


def test_weight_zero_is_plain_fine_tuning(make_config: MakeConfig) -> None:
    # with no clipping, which would see the projectors' gradient
    shared = ["optim.grad_clip=1e9"]
    plain = train(make_config(*shared, aligned=False))
    zero = train(make_config(*shared, "objectives.ra.weight=0", "name=zero"))
    one, two = weights(plain), weights(zero)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_clipping_the_step_takes_the_gradient_as_it_is(
    make_config: MakeConfig,
) -> None:
    """The norm is logged all the same, and is that before clipping."""
    common = ["optim.batch_size=4", "steps=1"]
    runs = {
        clip: train(make_config(*common, f"optim.grad_clip={clip}", f"name=clip-{clip}"))
        for clip in ("null", "1e9", "1e-12")
    }
    (norm,) = column(runs["null"], "grad/norm")
    assert norm > 1e-3 and [norm] == column(runs["1e9"], "grad/norm")
    assert [norm] == column(runs["1e-12"], "grad/norm")
    free, wide, tight = (weights(runs[clip]) for clip in ("null", "1e9", "1e-12"))
    assert all(torch.equal(free[name], wide[name]) for name in free)
    assert not all(torch.equal(free[name], tight[name]) for name in free)


def test_names_of_the_log(make_config: MakeConfig) -> None:
    kept = ["flow.reference_dropout=0", "flow.both_dropout=0"]
    path = train(make_config("steps=4", "tracking.log_every=2", "checkpoint.every=3", *kept))
    rows = read_rows(path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 4]
    shares = [rows[0][f"timesteps/t{i}"] for i in range(10)]
    assert sum(shares) == pytest.approx(1.0)
    assert shares[9] > 0  # shift 5 lifts most levels
    wanted = {"loss/total", "loss/flow", "loss/ra", "loss/ra/pull", "loss/ra/push"}
    wanted |= {"sim/ra", "sim/ra/centered"}
    wanted |= {"grad/norm", "lr", "time/step", "time/data", "memory/peak_mib"}
    for row in rows[1:4]:
        assert wanted <= row.keys()
    final = metrics(path)
    bins = [final[f"val/flow/t{i}"] for i in range(10)]
    assert final["val/flow"] == pytest.approx(sum(bins) / 10)
    assert {k: v for k, v in rows[4].items() if k not in ("step", "time")} == final
    assert final["time/step"] > 0 and final["memory/peak_mib"] > 50
    projectors = build_run(make_config()).alignment.parameters()
    assert final["params/extra"] == sum(p.numel() for p in projectors)


def test_a_finished_run_is_not_trained_again(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = train(make_config())
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    monkeypatch.setattr("alignlab.train.build_run", None)
    assert train(make_config()) == path
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


def test_a_run_that_another_command_trains_is_refused(make_config: MakeConfig) -> None:
    config = make_config()
    folder = RunFolder.create(config)
    with (
        only_writer(folder.path, wait=False),
        pytest.raises(UserError, match="is being trained by another process"),
    ):
        train(config)
    assert not folder.metrics.exists()
    assert train(config) == folder.path


def test_a_folder_of_another_recipe_is_refused(make_config: MakeConfig) -> None:
    path = train(make_config())
    with pytest.raises(UserError, match="another recipe"):
        train(make_config("optim.lr=2e-3"))
    train(make_config("checkpoint.every=7"))  # changes no number
    assert RunFolder.open(path).config().steps == 2


def test_an_infinite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_at_step_3(*args: Any, **options: Any) -> Features:
        features = teacher_features(*args, **options)
        calls.append(1)
        return replace(features, tokens_BTPD=features.tokens_BTPD / (len(calls) != 3))

    calls: list[int] = []
    monkeypatch.setattr("alignlab.training.alignment.teacher_features", broken_at_step_3)
    config = make_config(
        "steps=6", "checkpoint.every=2", "tracking.log_every=5", "flow.reference_dropout=0"
    )
    with pytest.raises(UserError) as stopped:
        train(config)
    message = str(stopped.value)
    assert "\n" not in message
    assert message.startswith("step 3: ") and "loss/ra" in message
    assert "loss/flow" not in message and "loss/total" not in message
    folder = RunFolder(Path(config.output) / "run")
    assert f"{folder.checkpoints / 'step-000002'}" in message
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step-000002"]
    assert [row["step"] for row in read_rows(folder.metrics)] == [0, 2]
    assert folder.read_result() is None
    # what was kept is good: with the cause gone the run resumes from there
    monkeypatch.undo()
    train(config)
    assert [row["step"] for row in read_rows(folder.metrics)] == [0, 2, 4, 5, 6, 6]


def test_weights_that_explode_are_never_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the loss of step 1 is finite, but not the weights that it leaves behind; no recipe may ask
    # for such a rate
    def explode(optimizer: torch.optim.Optimizer, *_: object) -> None:
        optimizer.param_groups[0]["lr"] = 1e30

    monkeypatch.setattr("alignlab.train.set_learning_rate", explode)
    config = make_config("steps=3", "checkpoint.every=1")
    with pytest.raises(UserError, match=r"^step 1: weights is not finite.*no checkpoint yet"):
        train(config)
    folder = RunFolder(Path(config.output) / "run")
    assert not list(folder.checkpoints.glob("*"))
    assert [row["step"] for row in read_rows(folder.metrics)] == [0]


def test_a_model_that_cannot_be_evaluated_is_no_result(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "alignlab.evaluation.evaluate.flow_loss",
        lambda velocity, *_: torch.full((len(velocity),), torch.inf),
    )
    config = make_config()
    with pytest.raises(UserError, match=r"val/flow is not finite.*lower optim\.lr"):
        train(config)
    assert RunFolder(Path(config.output) / "run").read_result() is None
