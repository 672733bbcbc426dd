"""A run on other files than it began with is refused by their names."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from alignlab.config.parts import TrainingConfig
from alignlab.config.run import RunConfig
from alignlab.data.video import write_mp4
from alignlab.distributed.ranks import Ranks
from alignlab.errors import UserError
from alignlab.losses.stage1.folder import Stage1Info, Stage1Teacher, save_stage1
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig
from alignlab.recipe import load_run, load_stage1_run
from alignlab.runs import input_record
from alignlab.runs.input_record import InputRecord, fix_inputs, hold_inputs, tell_changes
from alignlab.runs.inputs import read_inputs
from alignlab.runs.run_folder import RunFolder, only_writer
from alignlab.sampling import load_trained
from alignlab.train import train
from alignlab.training.setup import build_run, check_ranks_agree
from command_line import refused
from run_contents import timeless_metrics
from tiny_runs import TrainUntil

pytestmark = pytest.mark.usefixtures("shared_clips")

RECIPE = """
name: run
steps: 3
output: {root}/runs
model: {{path: {root}/wan}}
data: {{name: folder, path: {root}/data, frames: 5, size: [48, 48], fps: 6, val_fraction: 0.3}}
teachers:
  dino: {{family: dinov2, path: {root}/dino}}
  unread: {{family: dinov2, path: {root}/nowhere}}
objectives:
  ra: {{name: refalign, teacher: dino, blocks: [0, 2]}}
  mo: {{name: moalign, teacher: dino, blocks: [1], projector_dim: 8, head: {root}/head}}
checkpoint: {{every: 1}}
optim: {{batch_size: 1}}
eval: {{clips: 1, sample_clips: 0}}
tracking: {{mlflow: none, log_every: 1}}
"""
Change = Callable[[Path], object]


def write_clips(root: Path) -> None:
    levels = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 48, 48, 3)
    (root / "refs").mkdir(parents=True)
    rows = []
    for i in range(4):
        write_mp4(root / "clips" / f"c{i}.mp4", levels * (i + 9), 8)
        Image.new("RGB", (20, 20), (200, 30 * i, 30)).save(root / "refs" / f"r{i}.png")
        (root / "masks" / f"m{i}").mkdir(parents=True)
        for frame in range(8):
            mask = Image.new("L", (48, 48), 0)
            mask.paste(1, (4, 4, 30, 30))
            mask.save(root / "masks" / f"m{i}" / f"{frame:05d}.png")
        rows.append(
            {
                "file_name": f"clips/c{i}.mp4",
                "caption": f"clip {i}",
                "references": [f"refs/r{i}.png"],
                "masks": f"masks/m{i}",
                "entities": ["a card"],
            }
        )
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_head(folder: Path, seed: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    head = MotionHead(MotionHeadConfig(teacher_dim=24, width=6, hidden=8, decoder=4), seed=seed)
    info = Stage1Info(
        kind="moalign",
        teacher=Stage1Teacher(family="dinov2", path="dino", feature="post_norm"),
        teacher_dim=24,
        grid=(3, 3),
        module=head.config,
    )
    save_stage1(folder, head, info)


@pytest.fixture
def root(wan_folder: Path, teacher_folder: Path, tmp_path: Path) -> Path:
    """A folder with every kind of input."""
    shutil.copytree(wan_folder, tmp_path / "wan")
    shutil.copytree(teacher_folder, tmp_path / "dino")
    write_clips(tmp_path / "data")
    write_head(tmp_path / "head")
    (tmp_path / "run.yaml").write_text(RECIPE.format(root=tmp_path))
    return tmp_path


@pytest.fixture
def config(root: Path) -> RunConfig:
    return load_run(root / "run.yaml")


def begun(config: TrainingConfig) -> RunFolder:
    """The folder of a run that was begun and left a checkpoint."""
    folder = RunFolder.create(config)
    hold_inputs(folder, config)
    (folder.checkpoints / "step-000002").mkdir(parents=True)
    return folder


def scaled(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: value * 0.5 for name, value in tensors.items()}, file)


def edited(text: str, other: str) -> Change:
    def edit(path: Path) -> None:
        before = path.read_text()
        path.write_text(before.replace(text, other))
        assert path.read_text() != before

    return edit


def repainted(path: Path) -> None:
    with Image.open(path) as image:
        other = Image.new(image.mode, image.size, 1)
    other.save(path)


def without_last_row(path: Path) -> None:
    path.write_text("\n".join(path.read_text().split("\n")[:-2]) + "\n")


CHANGES: dict[str, tuple[str, Change, str]] = {
    "captions": ("data/metadata.jsonl", edited("clip 2", "clop 2"), "data: metadata.jsonl"),
    "a row removed": (
        "data/metadata.jsonl",
        without_last_row,
        "data: metadata.jsonl, clips/c3.mp4 is gone, masks/m3 is gone and 1 more",
    ),
    "a clip": (
        "data/clips/c1.mp4",
        lambda p: shutil.copyfile(p.with_name("c0.mp4"), p),
        "data: clips/c1.mp4",
    ),
    "a reference": ("data/refs/r1.png", repainted, "data: refs/r1.png"),
    "a mask": ("data/masks/m3/00002.png", repainted, "data: masks/m3"),
    "a mask more": (
        "data/masks/m3/00008.png",
        lambda p: shutil.copyfile(p.with_name("00000.png"), p),
        "data: masks/m3",
    ),
    "a clip lost": ("data/clips/c1.mp4", Path.unlink, "data: clips/c1.mp4"),
    "teacher weights": ("dino/model.safetensors", scaled, "teachers.dino: model.safetensors"),
    "teacher's mean": (
        "dino/preprocessor_config.json",
        lambda p: p.write_text('{"image_mean": 0.5, "image_std": 0.5}'),
        "teachers.dino: preprocessor_config.json is new",
    ),
    "VAE": (
        "wan/vae/diffusion_pytorch_model.safetensors",
        scaled,
        "model/vae: diffusion_pytorch_model.safetensors",
    ),
    "VAE's statistics": ("wan/vae/config.json", edited("[", "[ "), "model/vae: config.json"),
    "transformer": (
        "wan/transformer/diffusion_pytorch_model.safetensors",
        scaled,
        "model/transformer: diffusion_pytorch_model.safetensors",
    ),
    "text encoder": (
        "wan/text_encoder/model.safetensors",
        scaled,
        "model/text_encoder: model.safetensors",
    ),
    "tokenizer": (
        "wan/tokenizer/tokenizer_config.json",
        edited("{", "{ "),
        "model/tokenizer: tokenizer_config.json",
    ),
    "Stage 1": ("head", lambda p: write_head(p, 1), "objectives.mo.head: model.safetensors"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_input_is_refused_by_its_name_and_file(
    root: Path, config: RunConfig, what: str
) -> None:
    folder = begun(config)
    shutil.copytree(root, root.parent / f"{root.name}-kept", copy_function=shutil.copy2)
    path, change, expected = CHANGES[what]
    change(root / path)
    name, files = expected.split(": ")
    for finished in (False, True):
        if finished:
            folder.result.write_text('{"steps": 3, "metrics": {}}')
        with pytest.raises(UserError) as caught:
            hold_inputs(folder, config)
        assert str(caught.value) == (
            f"{folder.path}: {name} changed since this run began ({files}): restore it, "
            "or choose another name=..."
        )
    before = root.parent / f"{root.name}-kept" / path
    if before.is_dir():
        shutil.copytree(before, root / path, dirs_exist_ok=True)
    elif before.exists():
        shutil.copy2(before, root / path)
    else:
        (root / path).unlink()
    hold_inputs(folder, config)  # restored


def test_several_changes_are_named_together(root: Path, config: RunConfig) -> None:
    folder = begun(config)
    scaled(root / "dino" / "model.safetensors")
    edited('"clip ', '"clap ')(root / "data" / "metadata.jsonl")
    with pytest.raises(UserError) as caught:
        hold_inputs(folder, config)
    assert str(caught.value) == (
        f"{folder.path}: teachers.dino, data changed since this run began (model.safetensors; "
        "metadata.jsonl): restore them, or choose another name=..."
    )


def test_what_is_not_read_may_change(root: Path, config: RunConfig) -> None:
    folder = begun(config)
    record = (folder.path / "inputs.json").read_text()
    (root / "dino" / "README.md").write_text("about it")
    (root / "data" / "clips" / "other.mp4").write_text("in no row")
    (root / "wan" / "model_index.json").touch()
    hold_inputs(folder, config)
    assert (folder.path / "inputs.json").read_text() == record
    assert "unread" not in record  # a teacher that no objective and no metric reads


def test_a_run_without_a_checkpoint_may_have_its_inputs_mended(
    root: Path, config: RunConfig
) -> None:
    folder = RunFolder.create(config)
    hold_inputs(folder, config)
    edited('"clip ', '"clap ')(root / "data" / "metadata.jsonl")
    hold_inputs(folder, config)
    (folder.checkpoints / "step-000001").mkdir(parents=True)
    hold_inputs(folder, config)
    edited('"clap ', '"clip ')(root / "data" / "metadata.jsonl")
    with pytest.raises(UserError, match="data changed since this run began"):
        hold_inputs(folder, config)


def test_an_older_run_is_told_and_not_refused(
    root: Path, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    folder = begun(config)
    (folder.path / "inputs.json").unlink()
    hold_inputs(folder, config)
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder.path}: began before inputs were recorded: whether they have changed is not known"
    ]
    scaled(root / "dino" / "model.safetensors")  # since it was resumed
    with pytest.raises(UserError, match=re.escape("teachers.dino changed")):
        hold_inputs(folder, config)
    folder.result.write_text('{"steps": 3, "metrics": {}}')
    (folder.path / "inputs.json").unlink()
    hold_inputs(folder, config)
    assert not (folder.path / "inputs.json").exists()  # nothing is claimed of a finished run


def test_a_finished_run_outlives_its_inputs(root: Path, config: RunConfig) -> None:
    folder = begun(config)
    folder.result.write_text('{"steps": 3, "metrics": {}}')
    for gone in ("data", "wan", "dino", "head"):
        (root / gone).rename(root / f"{gone}-elsewhere")
    hold_inputs(folder, config)


@pytest.mark.parametrize("text", ["", "[]", '{"inputs": [{"name": 3}]}', "\0"])
def test_a_damaged_record_is_named(root: Path, config: RunConfig, text: str) -> None:
    folder = begun(config)
    (folder.path / "inputs.json").write_text(text)
    with pytest.raises(UserError, match=r"inputs\.json is damaged") as caught:
        hold_inputs(folder, config)
    assert "\n" not in str(caught.value)


def test_many_files_are_listed_once_for_all_runs(
    root: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_record, "MOST_INLINE", 12)
    folders = [begun(config.model_copy(update={"name": name})) for name in ("run", "other")]
    sizes = [len((folder.path / "inputs.json").read_bytes()) for folder in folders]
    (listing,) = (root / "runs" / ".inputs").iterdir()
    assert len(json.loads(listing.read_text())) == 13  # metadata, and three of each clip
    assert "clips/c0.mp4" not in (folders[0].path / "inputs.json").read_text() and max(sizes) < 4000
    repainted(root / "data" / "refs" / "r1.png")
    with pytest.raises(UserError, match=r"data changed since this run began \(refs/r1\.png\)"):
        hold_inputs(folders[1], config)
    listing.unlink()
    with pytest.raises(UserError, match="which file is not known, the list of them is gone"):
        hold_inputs(folders[0], config)


def test_inputs_that_were_fixed_hold_before_a_run_has_begun(root: Path, config: RunConfig) -> None:
    folder = RunFolder.create(config)
    fix_inputs(folder, config, read_inputs(config, fetch=False))
    scaled(root / "dino" / "model.safetensors")
    with pytest.raises(UserError, match=r"teachers\.dino changed since this run was planned"):
        hold_inputs(folder, config)
    now = read_inputs(config, fetch=False)
    with only_writer(folder.path, wait=False), pytest.raises(UserError, match="another process"):
        fix_inputs(folder, config, now)
    fix_inputs(folder, config, now)
    hold_inputs(folder, config)
    assert InputRecord(folder.path, config.output).is_fixed


def test_generated_clips_have_no_files(make_config: Callable[..., RunConfig]) -> None:
    names = [one.name for one in read_inputs(make_config(), fetch=False)]
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    assert names == [*(f"model/{part}" for part in parts), "teachers.dino"]


def test_a_stage_1_training_is_held_to_its_inputs(root: Path, tmp_path: Path) -> None:
    recipe = root / "stage1.yaml"
    recipe.write_text(
        f"name: first\nsteps: 2\noutput: {tmp_path}/runs\nmodel: {{path: {root}/wan}}\n"
        f"data: {{name: folder, path: {root}/data, frames: 5, size: [48, 48], fps: 6}}\n"
        f"teachers: {{dino: {{family: dinov2, path: {root}/dino}}}}\nstage1: {{kind: sara}}\n"
    )
    config = load_stage1_run("sara", recipe)
    names = {one.name for one in read_inputs(config, fetch=True)}
    assert names == {"model/text_encoder", "model/tokenizer", "teachers.dino", "data"}
    folder = begun(config)
    scaled(root / "wan" / "text_encoder" / "model.safetensors")
    assert refused("stage1", "sara", recipe) == (
        f"error: {folder.path}: model/text_encoder changed since this run began "
        "(model.safetensors): restore it, or choose another name=...\n"
    )


def without_stage1(root: Path, *overrides: str) -> RunConfig:
    """The run with RefAlign alone."""
    lines = (root / "run.yaml").read_text().split("\n")
    recipe = root / "one.yaml"
    recipe.write_text("\n".join(line for line in lines if not line.startswith("  mo: ")))
    return load_run(recipe, list(overrides))


class TwoRanks:
    """Notes what ranks compare."""

    world_size = 2

    def __init__(self) -> None:
        self.compared: dict[str, object] = {}

    def check_same(self, what: str, value: object) -> None:
        self.compared[what] = value


def test_ranks_compare_what_changes_no_number(root: Path) -> None:
    """One that evaluates alone would wait for the others."""
    run = build_run(without_stage1(root))

    def compared(every: int) -> dict[str, object]:
        evaluation = run.config.eval.model_copy(update={"every": every})
        config = run.config.model_copy(update={"eval": evaluation})
        ranks = TwoRanks()
        check_ranks_agree(dataclasses.replace(run, config=config, ranks=cast(Ranks, ranks)))
        return ranks.compared

    one, two = compared(1), compared(2)
    assert [name for name in one if one[name] != two[name]] == ["a setting"]


def test_ranks_with_clips_of_their_own_compare_their_files(root: Path) -> None:
    run = build_run(without_stage1(root))

    def compared() -> object:
        ranks = TwoRanks()
        check_ranks_agree(dataclasses.replace(run, ranks=cast(Ranks, ranks)))
        return ranks.compared["the files of the clips"]

    before = compared()
    shutil.copytree(root / "data", root / "copy")
    shutil.rmtree(root / "data")
    (root / "copy").rename(root / "data")
    assert compared() == before  # a copy, of another time
    edited("clip 2", "a longer caption")(root / "data" / "metadata.jsonl")
    assert compared() != before


def test_a_killed_run_on_other_inputs_is_refused_and_on_the_old_ones_resumes(
    root: Path, train_until: TrainUntil
) -> None:
    def config(name: str) -> RunConfig:
        return without_stage1(root, f"name={name}")

    uninterrupted = train(config("whole"))
    train_until(config("run"), 2)
    weights, kept = root / "dino" / "model.safetensors", root / "kept"
    shutil.copyfile(weights, kept)
    scaled(weights)
    with pytest.raises(UserError, match=r"teachers\.dino changed .* \(model\.safetensors\)"):
        train(config("run"))
    shutil.copyfile(kept, weights)
    assert timeless_metrics(train(config("run"))) == timeless_metrics(uninterrupted)


def without_checksum(text: str) -> str:
    """Of a recipe or a JSON file, as one who edits it has to leave it."""
    lines = [line for line in text.split("\n") if "sha256 of" not in line]
    return "\n".join(lines).replace('"checksum":', '"was":')


def test_what_looks_at_a_run_on_other_inputs_says_so(
    full_run: Path, wan_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    wan = shutil.copytree(wan_folder, tmp_path / "wan")
    run = shutil.copytree(full_run, tmp_path / "run")
    for name in ("recipe.yaml", "inputs.json"):
        text = without_checksum((run / name).read_text())
        (run / name).write_text(text.replace(str(wan_folder), str(wan)))
    load_trained(run)
    assert not caplog.records
    scaled(wan / "vae" / "diffusion_pytorch_model.safetensors")
    load_trained(run)
    expected = (
        f"{run}: model/vae changed since it began (diffusion_pytorch_model.safetensors): what "
        "follows is of the new"
    )
    assert [r.getMessage() for r in caplog.records] == [expected]
    caplog.clear()
    tell_changes(RunFolder(run), load_run(run / "recipe.yaml"))  # as a probe does
    assert [r.getMessage() for r in caplog.records] == [expected]
