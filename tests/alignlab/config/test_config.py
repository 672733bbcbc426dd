"""What a config refuses, and the defaults that papers and scripts rely on."""

from typing import Any

import pytest
from pydantic import ValidationError

from alignlab.config.data import FolderConfig, ShapesConfig
from alignlab.config.model import LoraConfig, ModelConfig
from alignlab.config.optim import OptimConfig
from alignlab.config.parts import FlowConfig, TeacherConfig
from alignlab.config.run import RunConfig, check_blocks
from alignlab.errors import UserError
from alignlab.losses import OBJECTIVES


def run_config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "x",
        "steps": 10,
        "model": {"path": "assets/tiny-wan"},
        "data": {"name": "shapes"},
        "teachers": {"dino": {"family": "dinov2"}},
        "objectives": {"ra": {"name": "refalign", "teacher": "dino", "blocks": [0, 1]}},
    }
    return RunConfig.model_validate(values | changes)


def test_objective_becomes_its_own_config() -> None:
    objective = run_config().objectives["ra"]
    assert type(objective) is OBJECTIVES["refalign"].Config
    assert objective.blocks == (0, 1)


def test_dump_of_an_objective_keeps_its_own_constants() -> None:
    dumped = run_config().model_dump(mode="json")
    assert dumped["objectives"]["ra"]["neg_weight"] == 1.0
    assert RunConfig.model_validate(dumped) == run_config()


def test_config_is_frozen() -> None:
    config = run_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3


def test_refalign_training_defaults() -> None:
    flow, optim = FlowConfig(), OptimConfig()
    assert (flow.sampler, flow.shift, flow.weighting) == ("shifted", 5.0, "none")
    assert (flow.text_dropout, flow.reference_dropout, flow.both_dropout) == (0.1, 0.1, 0.1)
    assert (optim.lr, optim.betas, optim.weight_decay) == (5e-5, (0.9, 0.999), 0.01)


@pytest.mark.parametrize(("frames", "near"), [(2, "1 or 5"), (10, "9 or 13"), (80, "77 or 81")])
def test_frames_name_the_nearest_that_fit(frames: int, near: str) -> None:
    with pytest.raises(ValidationError, match=f"4k\\+1.*use {near}"):
        ShapesConfig(frames=frames)
    with pytest.raises(ValidationError, match=near):
        FolderConfig(path="x", frames=frames)


@pytest.mark.parametrize("size", [(64, 60), (8, 64), (0, 64)])
def test_size_must_be_whole_patches(size: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="multiples of 16"):
        ShapesConfig(size=size)


@pytest.mark.parametrize("references", [(3, 2), (-1, 2)])
def test_reference_limits_are_ordered(references: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="fewest"):
        ShapesConfig(references=references)


@pytest.mark.parametrize(
    ("sampler", "key"),
    [
        ("uniform", "shift"),
        ("uniform", "logit_mean"),
        ("uniform", "logit_std"),
        ("shifted", "logit_mean"),
        ("shifted", "logit_std"),
    ],
)
def test_a_flow_setting_that_nothing_reads_is_refused(sampler: str, key: str) -> None:
    with pytest.raises(
        ValidationError, match=f"nothing reads it with sampler: {sampler}"
    ) as caught:
        FlowConfig.model_validate({"sampler": sampler, key: 2.0})
    assert caught.value.errors()[0]["loc"] == (key,)


@pytest.mark.parametrize("sampler", ["uniform", "shifted", "logit_normal"])
def test_a_dumped_flow_loads_again(sampler: str) -> None:
    flow = FlowConfig.model_validate({"sampler": sampler})
    dumped = flow.model_dump()
    assert ("shift" in dumped) == (sampler != "uniform")
    assert ("logit_std" in dumped) == (sampler == "logit_normal")
    assert FlowConfig.model_validate(dumped) == flow


def test_dropouts_must_leave_something() -> None:
    with pytest.raises(ValidationError, match="more than 1"):
        FlowConfig(text_dropout=0.5, reference_dropout=0.5, both_dropout=0.1)
    FlowConfig(text_dropout=0.5, reference_dropout=0.4, both_dropout=0.1)


def test_lora_settings_need_lora_training() -> None:
    with pytest.raises(ValidationError, match="set train: lora"):
        ModelConfig(path="x", lora=LoraConfig())


def test_lora_training_has_default_adapters() -> None:
    model = ModelConfig.model_validate({"path": "x", "train": "lora"})
    assert model.lora == LoraConfig()
    assert ModelConfig(path="x").lora is None


def test_accumulation_divides_the_batch() -> None:
    with pytest.raises(ValidationError, match="does not divide"):
        OptimConfig(batch_size=4, accumulate=3)
    OptimConfig(batch_size=4, accumulate=2)


def test_teacher_family_gives_path_and_feature() -> None:
    dinov2, dinov3 = TeacherConfig(family="dinov2"), TeacherConfig(family="dinov3")
    assert (dinov2.path, dinov2.feature) == ("facebook/dinov2-base", "post_norm")
    assert dinov3.feature == "pre_norm"
    assert TeacherConfig(family="dinov3", feature="layer:3").feature == "layer:3"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "dinov4"}, "unknown family 'dinov4', did you mean 'dinov"),
        ({"family": "dinov2", "feature": "last"}, "layer:k"),
        ({"family": "dinov2", "feature": "layer:x"}, "layer:k"),
    ],
)
def test_teacher_mistakes(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TeacherConfig.model_validate(values)


def test_objective_needs_an_existing_teacher() -> None:
    with pytest.raises(
        ValidationError, match=r"objectives\.ra\.teacher: unknown teacher 'dinoo'"
    ) as c:
        run_config(objectives={"ra": {"name": "refalign", "teacher": "dinoo", "blocks": [0]}})
    assert "did you mean 'dino'" in str(c.value)


def test_a_teacher_may_serve_evaluation_alone() -> None:
    run_config(objectives={})


@pytest.mark.parametrize("name", ["../x", "a/../b", "/a", "a//b", "", ".", "a b"])
def test_run_stays_inside_the_output_folder(name: str) -> None:
    with pytest.raises(ValidationError, match="folder inside"):
        run_config(name=name)


def test_val_split_is_large_enough() -> None:
    with pytest.raises(ValidationError, match=r"eval\.clips: 20 is more than data\.val_clips, 8"):
        run_config(data={"name": "shapes", "val_clips": 8}, eval={"clips": 20})


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("optim", {"lr": 0}),
        ("optim", {"betas": [0.9, 1.0]}),
        ("optim", {"ema": 1.0}),
        ("checkpoint", {"every": 0}),
        ("eval", {"sample_steps": 0}),
        ("tracking", {"log_every": 0}),
        ("tracking", {"mlflow": "wandb"}),
        ("steps", 0),
        ("seed", -1),
        ("optim", {"lr": float("nan")}),
    ],
)
def test_out_of_range(section: str, values: object) -> None:
    with pytest.raises(ValidationError):
        run_config(**{section: values})


def test_blocks_are_checked_against_the_model() -> None:
    config = run_config(
        objectives={"ra": {"name": "refalign", "teacher": "dino", "blocks": [0, 12]}}
    )
    check_blocks(config, 13)
    with pytest.raises(UserError, match=r"valid 0\.\.11"):
        check_blocks(config, 12)
    with pytest.raises(UserError) as caught:
        check_blocks(config, 8)
    assert str(caught.value) == (
        "objectives.ra.blocks: block 12 does not exist: this transformer has 8 blocks, "
        "valid 0..7 (block i is depth i+1)"
    )


def test_every_setting_is_described() -> None:
    def undescribed(model: type[Any]) -> list[str]:
        return [
            f"{model.__name__}.{key}"
            for key, field in model.model_fields.items()
            if key != "name"
            and not field.description
            and not hasattr(field.annotation, "model_fields")
        ]

    models = (ShapesConfig, FolderConfig, LoraConfig, ModelConfig, TeacherConfig, FlowConfig)
    assert [key for model in (*models, OptimConfig) for key in undescribed(model)] == []
