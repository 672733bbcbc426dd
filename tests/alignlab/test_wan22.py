"""Wan 2.2: one of two experts, and a model with larger tokens, from training to plain diffusers."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file
from torch import Tensor

from alignlab.config.parts import EvalConfig
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.evaluation.evaluate import FLOW_BINS, PROBE_SIGMAS
from alignlab.evaluation.probe import probe_run
from alignlab.experiments.probe.figures import map_tables
from alignlab.export import export
from alignlab.models.experts import Window
from alignlab.models.other_expert import OtherExpert
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.wan import load_wan
from alignlab.recipe import load_run
from alignlab.runs.checkpoint_folders import latest
from alignlab.sampling import Guidance, sample_latents, sample_to_file
from alignlab.teachers.diffusion import diffusion_folder
from alignlab.train import train
from alignlab.training.init_from import checked_source
from alignlab.training.self_teacher import SelfTeacher
from alignlab.training.setup import build_run
from run_contents import timeless_contents
from tiny_wan22 import BOUNDARY, write_a14b

pytestmark = pytest.mark.usefixtures("shared_clips")

TrainUntil = Callable[[RunConfig, int], None]
SARA = ("flow.sampler=logit_normal", "flow.shift=12")
CLIPS = ("eval.sample_clips=1", "eval.generated_clips=0")
ALL = ("objectives.ra.blocks=[0,1]", "checkpoint.every=2", *CLIPS)
WEIGHTS = "diffusion_pytorch_model.safetensors"
SUBJECT = "a red striped circle moves left over a grey background"


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_a14b(tmp_path_factory.mktemp("a14b"))


@pytest.fixture(scope="module")
def timesteps() -> Iterator[dict[str, list[Tensor]]]:
    """Those that transformers were given, by the run's name."""
    seen: dict[str, list[Tensor]] = {}
    call = ReferenceBranch.__call__

    def noted(self: ReferenceBranch, *inputs: Any, **more: Any) -> Any:
        seen.setdefault("now", []).append(inputs[1])
        return call(self, *inputs, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceBranch, "__call__", noted)
        yield seen


def expert_config(recipe_file: Path, model: Path, output: Path, *overrides: str) -> RunConfig:
    settings = [f"model.path={model}", f"output={output}", *ALL, *SARA, *overrides]
    return load_run(recipe_file, settings)


@pytest.fixture(scope="module")
def trained(
    a14b: Path,
    recipe_file: Path,
    timesteps: dict[str, list[Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Finished runs of both experts, all weights and a LoRA; not to be changed."""
    output, made = tmp_path_factory.mktemp("trained"), {}
    lora = ("model.train=lora", "model.lora.rank=4", "steps=2")
    for expert, more in (("high", ()), ("low", lora)):
        timesteps["now"] = []
        config = expert_config(
            recipe_file, a14b, output, f"name={expert}", f"model.expert={expert}", "steps=4", *more
        )
        made[expert] = train(config)
        timesteps[expert] = timesteps.pop("now")
    return made


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_all_levels_but_those_of_clips_are_the_trained_experts(
    trained: dict[str, Path], timesteps: dict[str, list[Tensor]]
) -> None:
    """Of training, validation and probes; a clip's are two steps of a batch of three."""
    for expert in trained:
        of_clips = [t for t in timesteps[expert] if len(t) == 3]
        others = torch.cat([t for t in timesteps[expert] if len(t) != 3])
        assert len(others) >= 2 * 2 + 2 * (10 + 3)
        assert bool(((others >= 1000 * BOUNDARY) == (expert == "high")).all())
        assert len({float(t[0]) for t in of_clips}) == 2


def test_bins_and_probes_cover_the_window(
    trained: dict[str, Path], timesteps: dict[str, list[Tensor]]
) -> None:
    window = Window(BOUNDARY, 1.0)
    seen = torch.cat(timesteps["high"]).div(1000).tolist()
    for share in [(b + 0.5) / FLOW_BINS for b in range(FLOW_BINS)] + list(PROBE_SIGMAS):
        assert any(abs(level - window.at(share)) < 1e-6 for level in seen)
    first = rows(trained["high"])[0]
    shares = [first[f"timesteps/t{i}"] for i in range(10)]
    assert sum(shares) == pytest.approx(1.0) and sum(share > 0 for share in shares) >= 5
    metrics = result(trained["high"])["metrics"]
    assert all(f"val/flow/t{b}" in metrics for b in range(FLOW_BINS))
    assert "cknna/block1" in metrics and (trained["high"] / "samples" / "0.mp4").is_file()


def test_a_probe_looks_at_the_levels_of_the_expert(trained: dict[str, Path]) -> None:
    found = probe_run(trained["high"])
    assert {cell.sigma for cell in found.cells} == set(found.sigmas)
    levels = (*found.sigmas, found.token_sigma, found.feature_sigma)
    assert all(BOUNDARY < sigma < 1 for sigma in levels) and set(found.tokens) == {
        "before",
        "after",
    }
    table = next(iter(map_tables(found.cells, {"cknna": ("CKNNA", "")}, found.sigmas)))
    assert all(None not in row for row in table.values["after"])


def test_an_expert_run_that_is_killed_resumes_exactly(
    trained: dict[str, Path],
    a14b: Path,
    recipe_file: Path,
    train_until: TrainUntil,
    tmp_path: Path,
) -> None:
    config = expert_config(recipe_file, a14b, tmp_path, "name=high", "model.expert=high", "steps=4")
    train_until(config, 3)
    again = timeless_contents(train(config))
    expected = timeless_contents(trained["high"])
    exempt = {".writer", "recipe.yaml", "environment.json", "metrics.jsonl", "result.json"}
    names = {name for name in expected if name.split("/")[0] not in exempt}
    assert [name for name in sorted(names) if again.get(name) != expected[name]] == []
    assert (
        result(tmp_path / "high")["metrics"]["val/flow"]
        == (result(trained["high"])["metrics"]["val/flow"])
    )


def test_the_export_replaces_one_expert_and_copies_the_other(
    trained: dict[str, Path], a14b: Path, tmp_path: Path
) -> None:
    out = export(trained["high"], tmp_path / "whole")
    newest = latest(trained["high"] / "checkpoints")
    assert newest is not None
    found = WanPipeline.from_pretrained(out)
    assert found.config.boundary_ratio == BOUNDARY
    for name, weights in load_file(newest / "transformer" / WEIGHTS).items():
        assert torch.equal(found.transformer.state_dict()[name], weights)
    base = WanPipeline.from_pretrained(a14b)
    for name, weights in base.transformer_2.state_dict().items():
        assert torch.equal(found.transformer_2.state_dict()[name], weights)
    one = next(iter(base.transformer.state_dict()))
    assert not torch.equal(found.transformer.state_dict()[one], base.transformer.state_dict()[one])
    found.set_progress_bar_config(disable=True)
    video = found(
        "a red circle", height=48, width=48, num_frames=5, num_inference_steps=3, output_type="pt"
    ).frames
    assert video.shape == (1, 5, 3, 48, 48) and bool(torch.isfinite(video).all())
    card = (out / "model_card.md").read_text()
    assert "high noise" in card


def test_an_adapter_of_the_low_expert_is_loaded_where_it_belongs(
    trained: dict[str, Path], a14b: Path, tmp_path: Path
) -> None:
    out = export(trained["low"], tmp_path / "adapter")
    pipeline = WanPipeline.from_pretrained(a14b)
    assert "load_into_transformer_2=True" in (out / "model_card.md").read_text()
    pipeline.load_lora_weights(out, load_into_transformer_2=True)
    assert pipeline.transformer_2.peft_config and not hasattr(pipeline.transformer, "peft_config")


def test_clips_are_generated_by_both_experts_as_in_diffusers(
    a14b: Path, recipe_file: Path, tmp_path: Path
) -> None:
    config = expert_config(recipe_file, a14b, tmp_path, "model.expert=low")
    wan = load_wan(str(a14b), expert="low")
    text_LD, negative_LD = wan.encode_text([SUBJECT, "a blur"])
    noise = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    guidance = Guidance(5, 12.0, 4.0, 1.0, text_low=3.0)
    none = noise[None, :, 0][:0]
    with ReferenceBranch.of(wan.transformer, config.model) as branch:
        with OtherExpert(wan, config.model, keeps=False) as other:
            found = sample_latents(branch, noise, text_LD, negative_LD, none, guidance, other=other)
            assert other.num_loads == 1 and not other.is_loaded  # it left before the exit
    pipeline = WanPipeline.from_pretrained(a14b)
    pipeline.scheduler = EvenSteps(shift=12.0)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=text_LD[None],
        negative_prompt_embeds=negative_LD[None],
        latents=noise[None],
        height=48,
        width=48,
        num_frames=5,
        num_inference_steps=5,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        output_type="latent",
    ).frames[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    levels = pipeline.scheduler.timesteps
    assert 0 < int((levels >= 1000 * BOUNDARY).sum()) < len(levels)  # both had steps


class EvenSteps(FlowMatchEulerDiscreteScheduler):
    """Euler steps from 1 to 0, as ours."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        even = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(sigmas=even, device=device)


def test_only_the_trained_expert_is_read_where_no_clip_is_generated(
    a14b: Path, recipe_file: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(a14b, tmp_path / "alone"))
    shutil.rmtree(alone / "transformer")
    settings = ("model.expert=low", "steps=1", "eval.clips=1")
    config = expert_config(recipe_file, alone, tmp_path, *settings, "eval.sample_clips=0")
    run = train(config)
    with pytest.raises(UserError, match="has no transformer/ folder, which is needed beside"):
        sample_to_file(run, SUBJECT, (), tmp_path / "clip.mp4", steps=2)
    with pytest.raises(UserError, match="to generate clips and to export"):
        export(run, tmp_path / "out")
    with pytest.raises(UserError, match="to generate clips"):  # before a step is taken
        train(config.model_copy(update={"name": "b", "eval": EvalConfig(clips=1)}))
    assert not (tmp_path / "b" / "metrics.jsonl").exists()
    inputs = json.loads((run / "inputs.json").read_text())["inputs"]
    names = {one["name"] for one in inputs}
    assert {"model/transformer_2", "model/model_index.json"} <= names
    assert "model/transformer" not in names


def test_a_run_is_not_resumed_with_another_boundary(
    a14b: Path, recipe_file: Path, train_until: TrainUntil, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(a14b, tmp_path / "moved"))
    config = expert_config(recipe_file, moved, tmp_path, "model.expert=high", "steps=3")
    train_until(config, 2)
    index = json.loads((moved / "model_index.json").read_text())
    (moved / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.9}))
    with pytest.raises(UserError, match=r"model/model_index\.json changed since this run began"):
        train(config)


@pytest.mark.parametrize(
    ("expert", "change", "message"),
    [
        (None, {}, "holds two transformers .* set model.expert to high or low"),
        ("high", {"boundary_ratio": None}, "boundary_ratio is None"),
        ("low", {"boundary_ratio": 1.5}, "boundary_ratio is 1.5"),
        ("low", {"transformer_2": [None, None]}, "model.expert: .* holds one transformer"),
    ],
)
def test_what_is_no_pair_of_experts_is_refused_in_one_line(
    a14b: Path, tmp_path: Path, expert: Any, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps(json.loads((a14b / "model_index.json").read_text()) | change)
    )
    with pytest.raises(UserError, match=message) as refused:
        load_wan(str(tmp_path), expert=expert)
    assert "\n" not in str(refused.value)


def test_of_a_hub_id_the_index_is_looked_at_first(
    a14b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(source: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(a14b)

    monkeypatch.setattr("alignlab.models.model_files.snapshot_download", snapshot)
    with pytest.raises(UserError, match="holds two transformers"):
        load_wan("somebody/two-experts")
    assert asked == [["model_index.json"]]
    load_wan("somebody/two-experts", expert="low", load_frozen=False)
    fetched = {pattern.split("/")[0] for pattern in asked[-1]}
    assert "transformer_2" in fetched and "transformer" not in fetched


def test_one_expert_does_not_start_from_the_other(
    a14b: Path, recipe_file: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    begun = f"model.init_from={trained['high']}"
    same, other = (
        expert_config(recipe_file, a14b, tmp_path, f"model.expert={expert}", begun)
        for expert in ("high", "low")
    )
    with ExitStack() as locks:
        assert checked_source(same, locks) is not None
        with pytest.raises(UserError, match=r"has model\.expert high, this run low"):
            checked_source(other, locks)


def test_two_experts_are_no_teacher(a14b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot(source: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(a14b)

    monkeypatch.setattr("alignlab.models.model_files.snapshot_download", snapshot)
    with pytest.raises(UserError, match="holds two transformers"):
        diffusion_folder("diffusion", "somebody/two-experts")
    assert asked == [["model_index.json"]]


def test_a_gate_that_is_constant_in_the_window_is_told(
    a14b: Path, recipe_file: Path, tmp_path: Path
) -> None:
    constant = "objectives.ra.gate={kind: window, low: 0.5, high: 1.0}"
    config = expert_config(recipe_file, a14b, tmp_path, "model.expert=high", constant)
    notes = build_run(config).notes
    assert [note for note in notes if "objectives.ra.gate: it is 1 at every" in note]
    varying = config.objectives["ra"].model_validate(
        {**config.objectives["ra"].model_dump(), "gate": "t^3"}
    )
    other = config.model_copy(update={"objectives": {"ra": varying}})
    assert not [note for note in build_run(other).notes if ".gate" in note]


def test_an_average_of_the_high_expert_sees_no_cleaner_level_than_it_knows(
    a14b: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    features = SelfTeacher.features

    def noted(self: SelfTeacher, branch: ReferenceBranch, batch: Any) -> Any:
        def watched(*inputs: Any, **more: Any) -> Any:
            seen.extend(inputs[1].tolist())
            return branch(*inputs, **more)

        return features(self, watched, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(SelfTeacher, "features", noted)
    small = "blocks: [0], deep_blocks: [1], cleaner: 0.2, projector_dim: 8"
    own = f"objectives={{sra: {{name: sra, {small}}}}}"
    settings = [f"model.path={a14b}", f"output={tmp_path}", "model.expert=high", *SARA, own]
    config = load_run(recipe_file, [*settings, "objectives.ra=null", "steps=3", "eval.clips=1"])
    train(config)
    assert len(seen) == 6 and min(seen) == 1000 * BOUNDARY
