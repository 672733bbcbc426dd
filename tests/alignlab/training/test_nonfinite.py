"""Numbers that are not finite: one line that names them, at the step or before the first one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignlab.config.run import RunConfig
from alignlab.data.registry import build_dataset
from alignlab.dataset_cache.clip_keys import text_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.errors import UserError
from alignlab.losses.objective import Features
from alignlab.models.frozen_parts import FrozenParts
from alignlab.models.text_encoder import TextEncoder
from alignlab.models.wan import load_text_encoder
from alignlab.runs.checkpoint_folders import latest
from alignlab.stage1.task import FrozenModels
from alignlab.teachers import Teacher, load_teacher
from alignlab.train import RunTrainer, Trainer, train
from alignlab.training.batches import Batch
from alignlab.training.checkpoint import TrainState
from alignlab.training.encoded import ClipPixels, FeatureRead, feature_key, kept_features
from alignlab.training.setup import build_run
from alignlab.training.step_terms import SampleTerms, StepScalars
from alignlab.training.teacher_features import teacher_features

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]
KEPT = ("flow.reference_dropout=0", "flow.both_dropout=0")


def poison_moment(state: TrainState) -> None:
    next(iter(state.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = torch.inf


def poison_average(state: TrainState) -> None:
    average = next(iter(state.ema.values()))  # type: ignore[attr-defined]
    average.view(-1)[0] = torch.nan


@pytest.mark.parametrize(
    ("poison", "named"),
    [
        (poison_moment, "step 2: the optimizer's exp_avg_sq is not finite"),
        (poison_average, "step 2: the moving average of the weights (optim.ema) is not finite"),
    ],
)
def test_what_a_step_leaves_behind_is_seen_at_the_next_row(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    poison: Callable[[TrainState], None],
    named: str,
) -> None:
    take_step = Trainer.step

    def poisoned(trainer: Trainer, batches: object) -> StepScalars:
        scalars = take_step(trainer, batches)  # type: ignore[arg-type]
        if trainer.state.step == 2:
            poison(trainer.state)
        return scalars

    monkeypatch.setattr(Trainer, "step", poisoned)
    config = make_config("steps=6", "optim.ema=0.5", "checkpoint.every=1")
    with pytest.raises(UserError) as stopped:
        train(config)
    assert str(stopped.value).startswith(named)
    checkpoints = Path(config.output) / "run/checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("broken", ["loss", "gradient", "features"])
def test_a_step_that_is_not_finite_changes_no_weight(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    run = build_run(make_config("steps=6", *KEPT))
    trainer, losses, features = RunTrainer(run), RunTrainer.losses, teacher_features

    def spoiled(trainer: RunTrainer, batch: Batch) -> tuple[torch.Tensor, SampleTerms]:
        loss, terms = losses(trainer, batch)
        if trainer.state.step == 1 and broken == "loss":
            terms = SampleTerms(terms.values_of | {"loss/ra": terms["loss/ra"] * torch.inf})
        if trainer.state.step == 1 and broken == "gradient":
            loss = loss + (loss - loss.detach()).sqrt()  # 0, of infinite slope
        return loss, terms

    def spoiled_features(*args: Any, **options: Any) -> Features:
        found = features(*args, **options)
        factor = torch.inf if trainer.state.step == 1 and broken == "features" else 1.0
        return replace(found, tokens_BTPD=found.tokens_BTPD * factor)

    def contents() -> list[torch.Tensor]:
        state = run.state.optimizer.state.values()
        return [*run.state.names, *(value for kept in state for value in kept.values())]

    monkeypatch.setattr(RunTrainer, "losses", spoiled)
    monkeypatch.setattr("alignlab.training.alignment.teacher_features", spoiled_features)
    with run.branch:
        trainer.step(trainer.micro_batches())
        before = [value.clone() for value in contents()]
        for _ in range(2):  # nor does a sound step after it
            trainer.step(trainer.micro_batches())
    assert all(torch.equal(*pair) for pair in zip(before, contents(), strict=True))
    named = {"loss": "loss/ra", "gradient": "grad/norm", "features": "features/dino/reference"}
    with pytest.raises(UserError, match=rf"^step 2: .*{named[broken]}.* is not finite"):
        trainer._nonfinite.raise_if_broken(None)


def test_a_teacher_whose_features_break_is_named(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Features:
        features = teacher_features(*args, **options)
        return replace(features, tokens_BTPD=features.tokens_BTPD * torch.inf)

    monkeypatch.setattr("alignlab.training.alignment.teacher_features", broken)
    with pytest.raises(UserError, match=r"^step 1: features/dino/reference.*of that teacher$"):
        train(make_config("flow.reference_dropout=0", "flow.both_dropout=0"))


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("optimizer.safetensors", torch.inf),
        ("ema.safetensors", torch.nan),
        ("objectives.safetensors", torch.nan),
        ("transformer/diffusion_pytorch_model.safetensors", -torch.inf),
    ],
)
def test_a_checkpoint_that_is_not_finite_is_not_resumed(
    make_config: MakeConfig, train_until: TrainUntil, file: str, value: float
) -> None:
    config = make_config("steps=3", "optim.ema=0.5", "checkpoint.every=1", "checkpoint.keep=1")
    train_until(config, 2)
    checkpoint = latest(Path(config.output) / "run/checkpoints")
    assert checkpoint is not None
    tensors = {name: tensor.clone() for name, tensor in load_file(checkpoint / file).items()}
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, 0] = value
    save_file(tensors, checkpoint / file, {"format": "pt"})
    (checkpoint / "checksums.json").unlink()  # written so by a version that had none
    with pytest.raises(UserError) as stopped:
        train(config)
    message = str(stopped.value)
    assert str(checkpoint) in message and "is not finite" in message and "\n" not in message
    assert name.removeprefix("objective_") in message and "remove that step's folder" in message
    # with the step's folder gone the run begins again
    shutil.rmtree(checkpoint)
    assert json.loads((train(config) / "result.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("encoder", "name"),
    [(FrozenParts, "encode_video"), (FrozenParts, "encode_image"), (TextEncoder, "encode")],
)
def test_a_clip_that_an_encoder_breaks_on_is_named(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, encoder: type, name: str
) -> None:
    encode = getattr(encoder, name)
    monkeypatch.setattr(encoder, name, lambda *a: encode(*a) * torch.inf)
    with pytest.raises(UserError, match=r"^shapes-0-\w+-0+\d: encoding its .* not finite"):
        train(make_config())


@pytest.mark.parametrize("is_kept", [False, True])
def test_an_embedding_that_is_not_finite_names_its_text(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    config = make_config(f"data.cache.texts={json.dumps(is_kept)}")
    values = EncodedValues.of(config.data.cache, config.output)
    text = load_text_encoder(config.model.path)
    teacher = load_teacher("tiny-dino")
    models = FrozenModels(teacher, (3, 3), text, torch.device("cpu"), values)
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda *a: encode(*a) * torch.nan)
    with pytest.raises(UserError, match=r"^the text 'a red ball': encoding its .* not finite"):
        models.embed(["a red ball"])
    assert not values.cache.has(text_key("a red ball", text.parts))


def test_features_that_are_not_finite_are_not_kept(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    values = EncodedValues.of(config.data.cache, config.output)
    pixels = ClipPixels(build_dataset(config.data, "train"), 0)
    read = FeatureRead(load_teacher("tiny-dino"), "video", (3, 3))
    encode = Teacher.encode

    def broken(*args: Any) -> Features:
        found = encode(*args)
        return replace(found, tokens_BTPD=found.tokens_BTPD * torch.inf)

    monkeypatch.setattr(Teacher, "encode", broken)
    with pytest.raises(UserError, match=r"^shapes-.*: teachers \(tiny-dino\) gives .*not finite"):
        kept_features(values, read, pixels)
    assert values.lacks(feature_key(read, pixels))
