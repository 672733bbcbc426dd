"""What the real harness owes every objective: exact resume, a clean export, and no effect at 0."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.export import export
from alignlab.kernels.pull_push import pull_push_chunked
from alignlab.losses.objective import TwoLevelConfig
from alignlab.losses.registry import BUILT_IN
from alignlab.recipe import load_run
from alignlab.runs.checkpoint_folders import latest
from alignlab.runs.run_folder import RunFolder
from alignlab.teachers import Teacher
from alignlab.train import RunTrainer, Trainer, train
from alignlab.training.batches import Batch
from alignlab.training.setup import Caches, build_run, new_caches
from alignlab.training.step_terms import StepScalars
from attention_tools import BF16InFp32Functions
from host_syncs import HostSyncs, on_device
from objective_settings import FEATURES, SETTINGS, teacher_of
from own_loops import clips_of, flow_of, predicted
from run_contents import timeless_contents, timeless_rows
from untrained_stage1 import write_untrained

TrainUntil = Callable[[RunConfig, int], None]

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def stage1(
    wan_folder: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Untrained Stage 1 networks for the teacher and the grid of the runs."""
    folder = tmp_path_factory.mktemp("stage1")
    wan, teacher = str(wan_folder), str(teacher_folder)
    return write_untrained(folder, teacher=teacher, dim=24, wan=wan, text_dim=32)


Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def make(recipe_file: Path, stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(name, objective, *overrides)`: a run of three steps with that objective, or none."""
    dino = load_run(recipe_file).teachers["dino"].path
    shared = [f"output={tmp_path_factory.mktemp('runs')}", "steps=3", "checkpoint.every=2"]
    for alias, feature in FEATURES.items():
        shared += [f"teachers.{alias}={{family: dinov2, path: {dino}, feature: '{feature}'}}"]
    shared += ["eval.clips=1", "flow.reference_dropout=0", "flow.both_dropout=0"]

    def made(name: str, objective: str | None, *overrides: str) -> RunConfig:
        chosen = []
        if objective is not None:
            settings = SETTINGS[objective].format(stage1=stage1)
            teacher = teacher_of(objective, settings)
            chosen = [f"objectives.ra={{name: {objective}, {teacher}{settings}}}"]
        config = load_run(recipe_file, [*shared, *chosen, *overrides, f"name={name}"])
        return config if chosen else config.model_copy(update={"objectives": {}})

    return made


@pytest.fixture(scope="module")
def caches(make: Make) -> Caches:
    return new_caches(make("any", None))


@pytest.fixture(scope="module", params=BUILT_IN)
def whole(request: pytest.FixtureRequest, make: Make, caches: Caches) -> tuple[str, Path]:
    """An objective, and its finished run."""
    name = request.param
    return name, train(make(name, name), caches=caches)


@pytest.fixture(scope="module")
def plain(make: Make, caches: Caches) -> dict[str, Tensor]:
    """Weights of the run without objectives, whose gradient is not clipped."""
    return weights(train(make("plain", None, "optim.grad_clip=1e9"), caches=caches))


def newest(run: Path) -> Path:
    folder = latest(run / "checkpoints")
    assert folder is not None
    return folder


def test_the_norms_of_queries_and_keys_alone_have_another_dtype_on_a_gpu(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a bf16 step, of all functions that CUDA's autocast runs in fp32 and the CPU's does not.

    So what tests emulate (`attention_tools.run_norms_as_cuda`) is all that a step has of it.
    """
    noted, take_step = BF16InFp32Functions(), Trainer.step

    def step(trainer: Trainer, batches: list[Batch]) -> StepScalars:
        with noted:
            return take_step(trainer, batches)

    monkeypatch.setattr(Trainer, "step", step)
    config = make("every", None, "model.precision=bf16", "steps=1")
    every = {name: make("every", name).objectives["ra"] for name in SETTINGS}
    # no shared caches: in bf16 the text encoder gives other embeddings
    train(config.model_copy(update={"objectives": every}))
    assert noted.names == {"rms_norm"}


# beyond the defaults of `SETTINGS`: what else they read, and how else they compute it
MORE: dict[str, str] = {
    "refalign-margin": "name: refalign, impl: chunked, foreground: 0.4, pos_margin: 0.2",
    "refalign-batch": "name: refalign, impl: chunked, negatives: batch",
    "videorepa-chunked": "name: videorepa, impl: chunked",
    "videorepa-student": "name: videorepa, grid: student",
    "sara-chunked": "name: sara, impl: chunked, grid: student",
    "sara-masks": "name: sara, saliency: masks, aligner: null",
    "moalign-chunked": "name: moalign, impl: chunked, grid: student",
    "repa-watched": "name: repa, schedule: {kind: stop_at_plateau}",
    "repa-normalized": "name: repa, gate: {kind: snr, normalize: true}, warmup: 9",
    "moalign-watched": "name: moalign, schedule: {kind: stop_at_plateau}",
    "repa-measured": "name: repa, weight: {gradient_share: 0.1, steps: 9}",
}


def with_objectives(config: RunConfig, make: Make, changes: Mapping[str, str]) -> RunConfig:
    """The run with an objective by each of these names: `SETTINGS`, and what is changed there."""
    objectives = {}
    for alias, written in changes.items():
        changed = yaml.safe_load(f"{{{written}}}")
        objective = make("any", changed["name"]).objectives["ra"]
        objectives[alias] = type(objective).model_validate(objective.model_dump() | changed)
    return config.model_copy(update={"objectives": objectives})


WHOLE = {name for name, row in BUILT_IN.items() if row.whole_step}
# a run has one average of the student, whose samples may hold two noise levels
TWO_LEVELS = {n for n, row in BUILT_IN.items() if issubclass(row.Config, TwoLevelConfig)}
SPREAD = {name: f"name: {name}" for name in BUILT_IN if name not in WHOLE | TWO_LEVELS}
TWO = {name: f"name: {name}" for name in TWO_LEVELS}


@pytest.mark.parametrize("changes", [SPREAD, {name: f"name: {name}" for name in WHOLE}, MORE, TWO])
def test_between_log_rows_a_step_waits_for_nothing(
    changes: Mapping[str, str], make: Make, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward pass, losses, backward pass, clipping, optimizer, average, counts, plateau.

    Without the forward pass of teachers, which the next test is of.
    """
    monkeypatch.setattr(Teacher, "encode", unseen(Teacher.encode))
    settings = (f"optim.accumulate={1 if WHOLE & changes.keys() else 2}", "optim.ema=0.9")
    run = build_run(with_objectives(make("syncs", None, *settings), make, changes), caches)
    with run.branch:
        RunTrainer(run).step(RunTrainer(run).micro_batches())  # what only the first step does
        with on_device(run):
            trainer = RunTrainer(run)
            batches = list(trainer.micro_batches())
            trainer.step(batches)
            with HostSyncs() as syncs:
                scalars = trainer.step(batches)
            assert syncs.names == []
            with HostSyncs() as syncs:
                assert {f"loss/{alias}" for alias in changes} <= set(scalars)
                float(scalars["loss/total"])
            assert syncs.names != []


def test_a_step_of_a_loop_of_ones_own_waits_for_nothing(
    make: Make, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward pass, losses, backward pass, plateau; teachers and pixels aside."""
    monkeypatch.setattr(Teacher, "encode", unseen(Teacher.encode))
    own = {name: f"name: {name}" for name, row in BUILT_IN.items() if row.reads != "self"}
    changes = own | MORE
    config = with_objectives(make("own-syncs", None, "data.references=[2,2]"), make, changes)
    run = build_run(config, caches)
    with on_device(run):
        alignment = run.alignment.attach()
        alignment._recorded._place = "after"
        (batch,) = RunTrainer(run).micro_batches()
        clips = clips_of(batch)
        for step in range(2):
            with HostSyncs() as syncs:
                with alignment.recording():
                    velocity = predicted(run.wan.transformer, batch)
                aligned = alignment(clips, step)
                (flow_of(velocity, batch).mean() + aligned.loss).backward()
                alignment.step_done(step, aligned)
        assert syncs.names == [] and len(aligned.terms) == len(changes)
        with HostSyncs() as syncs:
            float(aligned.scalars()["loss/repa"])
        assert syncs.names != []


@pytest.mark.gpu
@pytest.mark.parametrize("name", BUILT_IN)
def test_on_a_gpu_torch_sees_no_wait(name: str, make: Make, caches: Caches) -> None:
    settings = (f"optim.accumulate={1 if name in WHOLE else 2}", "optim.ema=0.9")
    run = build_run(make(f"gpu-{name}", name, *settings), caches)
    trainer = RunTrainer(run)
    with run.branch:
        batches = list(trainer.micro_batches())
        for _ in range(2):
            trainer.step(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BUILT_IN)
def test_features_from_the_cache_give_the_same_gradients(name: str, make: Make) -> None:
    found = []
    for mode in ("off", "write", "require"):
        run = build_run(make(f"cache-{name}", name, f"data.cache.mode={mode}"))
        trainer = RunTrainer(run)
        (batch,) = trainer.micro_batches()
        with run.branch:
            loss, _ = trainer.losses(batch)
        loss.backward()
        run.caches.values.flush()
        named = run.state.named_parameters()
        found.append({n: p.grad for n, p in named if p.grad is not None} | {"loss": loss})
    assert len(found[0]) > 1
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(value, other[n]) for n, value in found[0].items())


def unseen(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same, in which waits are not collected."""

    def inside(*args: Any) -> Any:
        with HostSyncs.paused():
            return work(*args)

    return inside


def test_a_teacher_waits_for_nothing(make: Make, caches: Caches) -> None:
    run = build_run(make("teacher", "repa"), caches)
    frames_BTHWC = run.clips[0].sample.video_THWC[None]
    teacher = run.alignment.teachers["dino"]
    assert isinstance(teacher, Teacher)
    with on_device(run):
        frames_BTHWC = frames_BTHWC.to("meta", non_blocking=True)
        teacher.encode(frames_BTHWC, (3, 3))  # what only the first pass does
        with HostSyncs() as syncs:
            teacher.encode(frames_BTHWC, (3, 3))
    assert syncs.names == []


def test_a_wait_for_the_device_is_seen() -> None:
    on_host, there = torch.arange(3.0), torch.arange(3.0, device="meta")
    waits: list[Callable[[], object]] = [
        lambda: float(there.sum()),
        lambda: bool(there.any()),
        lambda: there.tolist(),
        lambda: there.cpu(),
        lambda: there[there > 1],
        lambda: there.nonzero(),
        lambda: there.masked_select(there > 1),
        lambda: there.unique_consecutive(),
        lambda: torch.equal(there, there),
        lambda: on_host.to("meta"),
        lambda: there.copy_(on_host),
        lambda: torch.tensor(1.0, device="meta"),
        lambda: there.new_tensor([1.0]),
        lambda: there[torch.tensor([0, 1])],
        lambda: pull_push_chunked(there[:, None], there[:, None], (there > 1).long(), 0.0, 1.0),
    ]
    for number, wait in enumerate(waits):
        with HostSyncs() as syncs:
            wait()
        assert len(syncs.names) == 1, number
    with HostSyncs() as syncs:
        there.where(there > 1, 0.0).sum() + on_host.sum()
        on_host.to("meta", non_blocking=True)
        on_host[on_host > 1].tolist()
    assert syncs.names == []


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(newest(run) / WEIGHTS)


def log_of(run: Path) -> list[dict[str, float]]:
    """Every row without what depends on the clock."""
    return timeless_rows(run)


def test_every_objective_has_settings() -> None:
    assert sorted(SETTINGS) == sorted(BUILT_IN)


def test_it_trains_and_is_logged(whole: tuple[str, Path], plain: dict[str, Tensor]) -> None:
    _, run = whole
    rows = [row for row in log_of(run) if "loss/total" in row]
    assert len(rows) == 3 and all(row["loss/ra"] != 0 for row in rows)
    assert any(key.startswith("loss/ra/") for key in rows[0])
    assert all(("sim/ra" in row) == ("sim/ra/centered" in row) for row in rows)
    assert any(not torch.equal(value, plain[name]) for name, value in weights(run).items())


def test_its_run_folder_gives_back_its_config(whole: tuple[str, Path], make: Make) -> None:
    name, run = whole
    assert RunFolder.open(run).config() == make(name, name)


def test_a_killed_run_ends_as_the_uninterrupted_one(
    whole: tuple[str, Path], make: Make, train_until: TrainUntil, caches: Caches
) -> None:
    name, run = whole
    config = make(f"{name}-killed", name)
    train_until(config, 2)
    resumed = train(config, caches=caches)
    assert newest(resumed).name == newest(run).name == "step-000003"
    one, two = (timeless_contents(newest(r)) for r in (run, resumed))
    assert one.keys() == two.keys()
    assert [file for file in one if one[file] != two[file]] == []
    assert log_of(resumed) == log_of(run)


def test_its_export_holds_none_of_its_parameters(
    whole: tuple[str, Path], wan_folder: Path, tmp_path: Path
) -> None:
    _, run = whole
    exported = export(run, tmp_path / "export")
    files = {str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()}
    assert files == {"model_card.md"} | {
        str(p.relative_to(wan_folder)) for p in wan_folder.rglob("*") if p.is_file()
    }
    original, found = load_file(wan_folder / WEIGHTS), load_file(exported / WEIGHTS)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], value) for name, value in weights(run).items())


def test_weight_zero_gives_no_gradient(
    whole: tuple[str, Path], make: Make, caches: Caches, plain: dict[str, Tensor]
) -> None:
    name, _ = whole
    # with no clipping, which would see the projectors' gradient
    config = make(f"{name}-zero", name, "objectives.ra.weight=0", "optim.grad_clip=1e9")
    zero = weights(train(config, caches=caches))
    assert all(torch.equal(zero[name], value) for name, value in plain.items())


@pytest.mark.parametrize("name", ["sara", "moalign"])
def test_a_changed_stage1_network_ends_the_run(
    name: str, make: Make, caches: Caches, stage1: Path, train_until: TrainUntil
) -> None:
    config = make(f"{name}-changed", name)
    train_until(config, 2)
    file = stage1 / name / "model.safetensors"
    saved = file.read_bytes()
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file({**tensors, key: tensors[key] + 1}, file)
    with pytest.raises(UserError, match=r"objectives\.ra\.\w+ changed since this run began"):
        train(config, caches=caches)
    file.write_bytes(saved)
    finished = train(config, caches=caches)
    # and neither is a finished run returned, unless there is nothing left to compare it with
    save_file({**tensors, key: tensors[key] + 1}, file)
    with pytest.raises(
        UserError, match=r"^[^\n]*objectives\.ra\.\w+ changed since this run began[^\n]*$"
    ):
        train(config, caches=caches)
    file.write_bytes(saved)
    moved = (stage1 / name).rename(stage1 / "moved")
    assert train(config, caches=caches) == finished
    moved.rename(stage1 / name)
