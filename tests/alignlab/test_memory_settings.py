"""Runs whose optimizer and weights take less memory: trained, killed, resumed and exported."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from alignlab.errors import UserError
from alignlab.export import export
from alignlab.recipe import recipe_hash
from alignlab.runs.metric_rows import read_rows
from alignlab.sampling import load_trained
from alignlab.train import train
from run_contents import timeless_contents, timeless_metrics, timeless_rows
from tiny_runs import MakeConfig, TrainUntil

pytestmark = pytest.mark.usefixtures("shared_clips")

BF16 = ("model.weights=bf16", "model.precision=bf16", "optim.name=adamw_bf16_kahan")
SETTINGS: dict[str, tuple[str, ...]] = {"8_bit": ("optim.name=adamw_8bit",), "bf16": BF16}
LONG = ("steps=4", "optim.ema=0.9", "checkpoint.every=2", "optim.accumulate=2")


@pytest.fixture(params=SETTINGS)
def resumed(
    request: pytest.FixtureRequest, make_config: MakeConfig, train_until: TrainUntil
) -> tuple[str, Path, Path]:
    """Name of a setting, a run that was killed and resumed, and one that was not."""
    settings = SETTINGS[request.param]
    whole = train(make_config(*LONG, *settings, "name=whole"))
    config = make_config(*LONG, *settings, "name=killed")
    train_until(config, 3)
    return request.param, train(config), whole


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    resumed: tuple[str, Path, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    name, killed, whole = resumed
    assert timeless_contents(killed / "checkpoints") == timeless_contents(whole / "checkpoints")
    assert timeless_metrics(killed) == timeless_metrics(whole)
    assert timeless_rows(killed) == timeless_rows(whole)
    plain = train(make_config(*LONG, "name=plain"))
    logs = [read_rows(run / "metrics.jsonl") for run in (whole, plain)]
    losses = [[row["loss/total"] for row in rows if "loss/total" in row] for rows in logs]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    state = load_file(whole / "checkpoints" / "step-000004" / "optimizer.safetensors")
    dtypes = {key.rsplit("|")[-1]: value.dtype for key, value in state.items()}
    assert dtypes["state1" if name == "8_bit" else "rest"] == (
        torch.uint8 if name == "8_bit" else torch.bfloat16
    )
    average = load_file(whole / "checkpoints" / "step-000004" / "ema.safetensors")
    assert {value.dtype for value in average.values()} == {torch.float32}
    if name == "bf16":
        exported_keeps_its_weights(whole, tmp_path / "out")


def exported_keeps_its_weights(run: Path, out: Path) -> None:
    """The trained weights, without a moving average, as plain diffusers loads them."""
    from alignlab.training.checkpoint import ModelChoice

    folder = export(run, out, ModelChoice(None, False))
    mine = load_trained(run, ModelChoice(None, False)).transformer.state_dict()
    theirs = WanTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=torch.bfloat16
    ).state_dict()
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    (file,) = (run / "checkpoints" / "step-000004" / "transformer").glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        kept = {key: weights.get_tensor(key).dtype for key in weights.keys()}
    assert kept["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kept["blocks.0.norm2.weight"] == kept["blocks.0.scale_shift_table"] == torch.float32


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("model.weights=bf16",), "set precision: bf16"),
        ((*BF16[:2],), r"bf16 loses the steps of adamw, .* set optim\.name: adamw_bf16_kahan"),
        ((*BF16[:2], "optim.name=adamw_8bit"), "loses the steps of adamw_8bit"),
        ((*BF16, "model.train=lora"), "weights: bf16 is for train: full"),
        ((BF16[2],), "has nothing to keep beside fp32 weights"),
        (("optim.name=adam",), r"optim\.name: .*adamw_8bit"),
    ],
)
def test_settings_that_do_not_suit_each_other_are_refused(
    settings: tuple[str, ...], line: str, make_config: MakeConfig
) -> None:
    with pytest.raises(UserError, match=line):
        make_config(*settings)


def test_what_saves_memory_is_part_of_a_recipe_where_it_changes_numbers(
    make_config: MakeConfig,
) -> None:
    plain = recipe_hash(make_config())
    assert recipe_hash(make_config("optim.offload=true")) == plain
    assert recipe_hash(make_config("optim.name=adamw_8bit")) != plain
    assert recipe_hash(make_config("model.precision=bf16")) != recipe_hash(make_config(*BF16))


def test_offloading_is_refused_before_any_work_without_a_gpu(make_config: MakeConfig) -> None:
    config = make_config("optim.offload=true")
    with pytest.raises(UserError, match=r"^optim\.offload: weights are on cpu"):
        train(config)
    assert not list((Path(config.output) / config.name).glob("checkpoints/*"))
