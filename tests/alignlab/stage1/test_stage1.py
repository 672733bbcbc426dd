"""`alignlab stage1`: it trains, logs what it measures, and resumes bitwise."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from alignlab.data.sample import Sample
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.distributed.ranks import single_rank
from alignlab.errors import UserError
from alignlab.losses.stage1.folder import load_stage1
from alignlab.randomness import generator
from alignlab.recipe import load_stage1_run
from alignlab.runs.metric_rows import read_rows
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.train import Stage1Trainer, stage1_trainer, train_stage1
from alignlab.tracking.mlflow_run import read_state
from alignlab.training.clip_memory import ClipMemory
from alignlab.training.prefetch import THREAD_NAME
from command_line import alignlab
from killed_stage1 import MOMENTS, run_all
from run_contents import file_contents, timeless_contents, timeless_rows

KINDS = ["sara", "moalign"]

Recipes = dict[str, Path]


def config_of(recipes: Recipes, kind: Any, *overrides: str) -> Stage1Config:
    return load_stage1_run(kind, recipes[kind], list(overrides))


def trainer_of(config: Stage1Config) -> Stage1Trainer:
    return stage1_trainer(config, single_rank("fp32"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_trains_and_returns_a_finished_run_as_it_is(
    recipes: Recipes, kind: Any, tmp_path: Path
) -> None:
    arguments = ("stage1", kind, recipes[kind], f"output={tmp_path}")
    result = alignlab(*arguments)
    run = tmp_path / "first"
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout == f"stage 1 folder: {run / 'stage1'}\n"
    assert sorted(p.name for p in run.iterdir()) == [
        *(".writer", ".writer.lock", "checkpoints", "code.diff", "code.json", "environment.json"),
        *("inputs.json", "metrics.jsonl", "recipe.yaml", "result.json", "stage1"),
    ]
    written = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert alignlab(*arguments).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == written


def test_mlflow_has_the_run(recipes: Recipes, tmp_path: Path) -> None:
    into = [f"output={tmp_path}", "tracking.mlflow=sqlite", "steps=1"]
    folder = train_stage1(config_of(recipes, "moalign", *into))
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(read_state(folder.parent)["run_id"])
    assert run.info.status == "FINISHED" and run.data.params["stage1.kind"] == "moalign"
    assert run.data.metrics["val/flow_l1"] >= 0


def test_clipping_is_a_setting_of_stage1_too(recipes: Recipes, tmp_path: Path) -> None:
    norms = []
    for clip in ("null", "1e-6"):
        into = [f"output={tmp_path / clip}", f"optim.grad_clip={clip}", "steps=1"]
        folder = train_stage1(config_of(recipes, "moalign", *into))
        norms.append(read_rows(folder.parent / "metrics.jsonl")[0]["grad/norm"])
    assert norms[0] == norms[1] > 1e-5


def test_what_is_logged_and_measured(networks: Recipes) -> None:
    logged = {
        "sara": {"loss/total", "loss/bce", "loss/info_nce"},
        "moalign": {"loss/total"},
    }
    ious = {f"val/iou{of}" for of in ("", "_union", "_foreground", "_background", "_caption")}
    flows = {f"val/flow_l1{of}" for of in ("", "_zero", "_mean", "_clip_mean")}
    measured = {"sara": ious | {"val/bce"}, "moalign": flows}
    for kind, folder in networks.items():
        rows = read_rows(folder.parent / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 3]
        assert all(
            logged[kind] | {"grad/norm", "lr", "time/step"} <= row.keys() for row in rows[:3]
        )
        result = json.loads((folder.parent / "result.json").read_text())
        assert measured[kind] <= result["metrics"].keys() and result["steps"] == 3
        assert measured[kind] <= rows[3].keys()
        for key in measured[kind] - {"val/bce"}:
            assert 0 <= result["metrics"][key] <= 1, key
    rates = [row["lr"] for row in read_rows(networks["sara"].parent / "metrics.jsonl")[:3]]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])


def test_the_folder_says_what_it_was_trained_on(
    networks: Recipes, wan_folder: Path, teacher_folder: Path
) -> None:
    aligner, sara = load_stage1(networks["sara"], "sara")
    head, moalign = load_stage1(networks["moalign"], "moalign")
    for info in (sara, moalign):
        assert (info.teacher.family, info.teacher.feature) == ("dinov2", "post_norm")
        assert info.teacher.path == str(teacher_folder)
        assert (info.teacher_dim, info.grid) == (24, (3, 3))
    assert (sara.text, moalign.text) == (str(wan_folder), None)
    assert aligner.saliency(torch.ones(2, 5, 9, 24), torch.ones(2, 4, 32)).shape == (2, 5, 9)
    assert head.motion(torch.ones(2, 5, 9, 24), (5, 3, 3)).shape == (2, 5, 9, 8)


def test_training_lowers_the_losses(recipes: Recipes, tmp_path: Path) -> None:
    for kind, loss in (("sara", "loss/bce"), ("moalign", "loss/total")):
        longer = ["steps=30", "optim.lr=1e-2", "optim.schedule=constant", f"output={tmp_path}"]
        folder = train_stage1(config_of(recipes, kind, *longer, f"name={kind}"))
        losses = [row[loss] for row in read_rows(folder.parent / "metrics.jsonl")[:-1]]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), kind


@pytest.fixture(scope="module")
def resumed(recipes: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `killed_stage1.run_all` leaves."""
    folder = tmp_path_factory.mktemp("resume")
    for kind, recipe in recipes.items():
        text = recipe.read_text().replace("steps: 3", "steps: 7")
        (folder / f"{kind}.yaml").write_text(text)
    run_all(folder, recipes)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_ends_as_the_uninterrupted_one(resumed: Path, kind: str) -> None:
    outputs = resumed / kind
    left = {
        moment: sorted(p.name for p in (outputs / f"{moment}-killed").glob("first/checkpoints/*"))
        for moment in MOMENTS
    }
    assert left == {
        "between checkpoints": ["step-000003"],
        "right after a checkpoint": ["step-000003", "step-000006"],
        "while the result is written": ["step-000006", "step-000007"],
    }
    assert not list(outputs.glob("*-killed/first/result.json"))
    assert not list(outputs.glob("*-killed/first/stage1"))
    assert list(outputs.glob("*-killed/first/.stage1.tmp"))
    expected = timeless_contents(outputs / "uninterrupted" / "first")
    assert {"stage1/model.safetensors", "checkpoints/step-000007/state.json"} <= expected.keys()
    # .writer names the process that trained it last
    timed = {".writer", "recipe.yaml", "environment.json", "metrics.jsonl", "result.json"}
    for moment in MOMENTS:
        found = timeless_contents(outputs / moment / "first")
        assert found.keys() == expected.keys()
        assert [n for n in found.keys() - timed if found[n] != expected[n]] == []
        rows = timeless_rows(outputs / "uninterrupted" / "first")
        other = timeless_rows(outputs / moment / "first")
        assert rows == other and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 7]


def test_clips_in_memory_change_no_number(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        runs = [trainer_of(config_of(recipes, kind)) for _ in range(2)]
        monkeypatch.setattr(runs[0].clips, "_memory", ClipMemory(0))
        for run in runs:
            run.clips[2], run.clips[1]
        (plain, cached) = (run.task.loss([run.clips[1], run.clips[2]])[0] for run in runs)
        assert torch.equal(plain, cached)
        assert runs[1].clips[2] is runs[1].clips[2] and runs[0].clips[2] is not runs[0].clips[2]


def test_the_clips_of_a_step_depend_on_seed_and_step_alone(recipes: Recipes) -> None:
    run = trainer_of(config_of(recipes, "sara", "seed=3", "optim.batch_size=5"))
    dataset = ShapesDataset(run.config.data, "train")  # type: ignore[arg-type]
    for step in (0, 1, 7):
        run.state.step = step
        drawn = [
            int(torch.randint(len(dataset), (), generator=generator(3, "clip", step, i)))
            for i in range(5)
        ]
        (batch,) = run.micro_batches()
        assert [c.caption for c in batch] == [dataset[i].caption for i in drawn]


@pytest.mark.parametrize("kind", KINDS)
def test_clips_made_ahead_change_no_number_and_leave_the_training_nothing_to_decode(
    recipes: Recipes, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, trained = ShapesDataset.__getitem__, threading.current_thread()
    decoded: list[str] = []

    def read(dataset: ShapesDataset, index: int) -> Sample:
        if threading.current_thread() is trained and dataset.split == "train":
            decoded.append(dataset.key(index))
        return decode(dataset, index)

    def run(name: str, *settings: str) -> Path:
        flow = ["stage1.flow=dis"] if kind == "moalign" else []
        shared = [f"output={tmp_path}", "data.cache.mode=off", "data.train_clips=50", *flow]
        return train_stage1(config_of(recipes, kind, f"name={name}", *shared, *settings))

    plain = run("plain", "data.workers=0")
    monkeypatch.setattr(ShapesDataset, "__getitem__", read)
    ahead = run("ahead", "data.workers=2", "data.prefetch=2")
    assert len(decoded) == 2  # the first step's
    assert not [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]
    assert file_contents(ahead) == file_contents(plain)
    assert timeless_rows(ahead.parent) == timeless_rows(plain.parent)


def test_a_prolonged_training_is_the_long_one(recipes: Recipes, tmp_path: Path) -> None:
    constant = (f"output={tmp_path}", "optim.schedule=constant", "tracking.log_every=3")
    long = train_stage1(config_of(recipes, "moalign", "steps=4", *constant, "name=long"))
    train_stage1(config_of(recipes, "moalign", "steps=2", *constant))
    short = train_stage1(config_of(recipes, "moalign", "steps=4", *constant))
    assert file_contents(short) == file_contents(long)
    last = [timeless_contents(run.parent / "checkpoints" / "step-000004") for run in (short, long)]
    assert last[0] == last[1] and "optimizer.safetensors" in last[0]
    assert timeless_rows(short.parent) == timeless_rows(long.parent)
    result = json.loads((short.parent / "result.json").read_text())
    assert result["notes"][-1].startswith("prolonged: it was planned for fewer steps at first [2")


def test_its_moments_may_take_8_bits(recipes: Recipes, tmp_path: Path) -> None:
    eight = ["optim.name=adamw_8bit", f"output={tmp_path}", "stage1.hidden=192"]
    config = load_stage1_run("sara", recipes["sara"], eight)
    assert train_stage1(config).is_dir()
    (file,) = tmp_path.rglob("optimizer.safetensors")
    assert any(key.endswith("|state1") for key in load_file(file))
    with pytest.raises(UserError, match="Stage 1 trains in fp32"):
        load_stage1_run("sara", recipes["sara"], ["optim.name=adamw_bf16_kahan"])
