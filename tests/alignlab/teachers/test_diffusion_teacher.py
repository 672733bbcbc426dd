"""Diffusion teachers: what they see and give, and what a run makes of it."""

import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.data.registry import build_dataset
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.dataset_cache.clip_keys import content_digest
from alignlab.dataset_cache.key import CacheKey
from alignlab.dataset_cache.survey import survey
from alignlab.evaluation.teacher_score import score_teachers
from alignlab.export import export
from alignlab.losses.objective import Features
from alignlab.models.wan import frozen_parts
from alignlab.runs.inputs import read_inputs
from alignlab.teachers import DiffusionTeacher, diffusion
from alignlab.train import train
from alignlab.training import cache_build
from alignlab.training.cache_build import (
    Encoders,
    Here,
    LocalProcesses,
    build_cache,
    used_entries,
)
from alignlab.training.encoded import (
    ClipPixels,
    FeatureRead,
    clip_noise,
    feature_key,
    kept_features,
)
from alignlab.training.setup import Run, build_run, check_teachers_and_eval
from command_line import refused
from host_syncs import HostSyncs
from loaded_models import LoadedModels
from random_tensors import draw
from run_contents import file_contents, timeless_contents, timeless_rows
from tiny_runs import MakeConfig, TrainUntil

RANDOM = "model.init=random"
REPA = (
    "objectives.ra=null",
    "objectives.p={name: repa, teacher: dit, blocks: [1], projector_dim: 16}",
)
SMALL = (*REPA, "eval.clips=2", "optim.batch_size=2", "checkpoint.every=1")

Make = Callable[..., RunConfig]


@pytest.fixture
def make(make_config: MakeConfig, wan_folder: Path) -> Make:
    """Runs that align with block 1 of the tiny Wan itself."""

    def config(*overrides: str, teacher: str = "", path: Path = wan_folder) -> RunConfig:
        row = f"teachers.dit={{family: diffusion, path: {path}, feature: 'layer:1'{teacher}}}"
        return make_config(row, *SMALL, *overrides)

    return config


def teacher_of(config: RunConfig) -> DiffusionTeacher:
    """The teacher of a recipe; no model is loaded."""
    frozen = frozen_parts(Path(config.model.path), precision="fp32", device="cpu")
    return DiffusionTeacher(
        config.teachers["dit"],
        alias="dit",
        encoders=frozen,
        clip=config.data,
        device="cpu",
        load=False,
    )


@torch.no_grad()
def plain_features(folder: Path, latents: Tensor, text: Tensor, noise_level: float) -> Tensor:
    """Output of block 1 in a forward pass of diffusers, (N, D)."""
    model = WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    found: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda module, inputs, out: found.append(out))
    model(
        hidden_states=latents[None],
        timestep=torch.tensor([noise_level * 1000]),
        encoder_hidden_states=text[None],
    )
    tokens_ND: Tensor = found[0][0]
    return tokens_ND


@pytest.mark.parametrize(
    ("settings", "caption", "noise_level"),
    [
        (", centred: false", True, 0.1),
        (", centred: false, caption: false, noise_level: 0.4", False, 0.4),
    ],
)
def test_features_are_those_of_a_plain_forward_pass(
    make: Make, wan_folder: Path, settings: str, caption: bool, noise_level: float
) -> None:
    run = build_run(make("data.cache.mode=off", teacher=settings))
    teacher, clip = run.alignment.teachers["dit"], run.clips[0]
    read = FeatureRead(teacher, "video", (3, 3))
    assert run.alignment.reads(0) == [read] and teacher.dim == 48
    noise = clip_noise(clip.pixels, clip.latents_CTHW)
    noisy = (1 - noise_level) * clip.latents_CTHW + noise_level * noise
    text = run.wan.encode_text([clip.pixels.caption if caption else ""])[0]
    expected = plain_features(wan_folder, noisy, text, noise_level)
    found = clip.features(read)
    assert found.shape == (2, 9, 48)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_centred_features_have_no_mean_over_the_first_train_clips(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignlab.training.centring.CENTRE_CLIPS", 4)
    raw = build_run(make("data.cache.mode=off", teacher=", centred: false"))
    centred = build_run(make("data.cache.mode=off"))

    def features(run: Run) -> Tensor:
        (read,) = run.alignment.reads(0)
        return torch.stack([run.clips[i].features(read) for i in range(6)])

    one, two = features(raw), features(centred)
    mean_D = one[:4].flatten(0, 2).double().mean(0)
    torch.testing.assert_close(two, (one - mean_D).float(), rtol=1e-5, atol=1e-5)
    assert mean_D.abs().max() > 0.1


def test_features_do_not_depend_on_the_attention_of_the_run(make: Make) -> None:
    features = []
    for backend in ("_native_math", "native"):  # diffusers keeps the last one for the process
        run = build_run(make(f"model.attention={backend}", "data.cache.mode=off"))
        teacher = run.alignment.teachers["dit"]
        assert isinstance(teacher, DiffusionTeacher)
        noisy_BCTHW = draw(1, *teacher.latent_shape)
        features.append(teacher.encode(noisy_BCTHW, draw(1, 7, teacher.text_dim)).tokens_BTPD)
    assert torch.equal(*features)


def test_the_noise_belongs_to_the_clip(make: Make) -> None:
    like = torch.zeros(16, 2, 6, 6)

    def noise(*overrides: str, index: int = 0) -> Tensor:
        dataset = build_dataset(make(*overrides).data, "train")
        return clip_noise(ClipPixels(dataset, index), like)

    assert torch.equal(noise(), noise("seed=5", "data.train_clips=4"))
    assert not torch.equal(noise(), noise(index=1))
    assert not torch.equal(noise(), noise("data.seed=5"))


def changed(folder: Path, to: Path, part: str) -> Path:
    """A copy of a pipeline with other weights in one part."""
    copy = Path(shutil.copytree(folder, to))
    (weights,) = (copy / part).glob("*.safetensors")
    tensors = load_file(weights)
    name = min(name for name, value in tensors.items() if value.ndim > 1)
    save_file(tensors | {name: tensors[name] * 2}, weights, metadata={"format": "pt"})
    return copy


def test_each_input_of_a_feature_is_in_its_key(
    make: Make, wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(
        *overrides: str, teacher: str = "", path: Path = wan_folder, index: int = 0
    ) -> CacheKey:
        config = make(*overrides, teacher=teacher, path=path)
        found = teacher_of(config)
        pixels = ClipPixels(build_dataset(config.data, "train"), index)
        return feature_key(FeatureRead(found, "video", found.grid), pixels)

    plain = key()
    others = {
        "clip": key(index=1),
        "data": key("data.seed=3"),
        "size": key("data.size=[48, 64]"),
        "feature": key("teachers.dit.feature=layer:2"),
        "noise level": key(teacher=", noise_level: 0.2"),
        "caption": key(teacher=", caption: false"),
        "transformer": key(path=changed(wan_folder, tmp_path / "t", "transformer")),
    }
    for part in ("vae", "text_encoder"):
        folder = changed(wan_folder, tmp_path / part, part)
        others[part] = key(f"model.path={folder}", path=folder)
    folder = Path(shutil.copytree(wan_folder, tmp_path / "tokenizer"))
    (folder / "tokenizer" / "more.txt").write_text("more")
    others["tokenizer"] = key(f"model.path={folder}", path=folder)
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "NOISE_SEED", 1)
        others["noise"] = key()
    with monkeypatch.context() as patch:
        patch.setattr(ShapesDataset, "caption", lambda dataset, index: "another caption")
        others["text"] = key()
        assert key(teacher=", caption: false") == others["caption"]
    digests = {name: one.digest for name, one in others.items()}
    assert plain.digest not in digests.values(), digests
    assert len(set(digests.values())) == len(digests)
    # an entry is what the transformer gave
    assert key(teacher=", centred: false") == key("teachers.dit.shuffle=true") == plain
    assert key(path=Path(shutil.copytree(wan_folder, tmp_path / "same"))) == plain
    content = content_digest(plain.kind, plain.parts)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 99)
        there = key()
        assert there != plain and content_digest(there.kind, there.parts) == content


def test_a_run_is_the_same_with_the_cache_off_cold_and_warm(
    make: Make, loaded_models: LoadedModels
) -> None:
    def trained(name: str, mode: str, *more: str) -> tuple[object, dict[str, bytes]]:
        folder = train(make(RANDOM, f"name={name}", f"data.cache.mode={mode}", *more))
        kept = timeless_contents(folder / "checkpoints")
        return timeless_rows(folder), {k: v for k, v in kept.items() if k.endswith("tensors")}

    off = trained("live", "off")
    (built,) = build_cache([make(RANDOM, "name=built")])
    loaded_models.counts.clear()
    assert trained("warm", "require") == off == trained("ahead", "read", "data.workers=2")
    assert not loaded_models.counts
    # what pruning keeps is all that was built
    entries = [row.id for _, row in survey(built.path).rows()]
    assert len(used_entries([make(RANDOM)])) == len(set(entries))


@pytest.mark.parametrize("encoders", [Here(), LocalProcesses(2)], ids=["here", "a process"])
def test_a_build_centres_last_and_tells_before_what_all_clips_take(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    encoders: Encoders,
) -> None:
    monkeypatch.setattr(cache_build, "get_context", lambda kind: get_context("fork"))
    encoded = count_encodings(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="5 clips need about"):
        patch.setattr(cache_build, "disk_room", lambda path: (5e9 + 10, 5e9))
        build_cache([make("name=small", f"output={tmp_path / 'small'}")], encoders)
    assert len(encoded) == 4  # of noise, and of the first clips
    caplog.set_level("INFO")
    encoded.clear()
    (built,) = build_cache([make()], encoders)
    assert (built.clips, built.encoded) == (8, 8)
    assert len(encoded) == (7 if isinstance(encoders, Here) else 4)  # no clip twice
    begins = [
        next(i for i, line in enumerate(caplog.messages) if re.search(told, line))
        for told in ("5 clips to encode, about [0-9.]+ [kM]B", "teachers.dit: mean of its .*: 6/6")
    ]
    assert begins == sorted(begins)
    (again,) = build_cache([make()], encoders)
    assert (again.encoded, again.size) == (0, 0)


def count_encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an element for every pass of the teacher in this process."""
    encode, found = DiffusionTeacher.encode, list[int]()

    def counted(teacher: DiffusionTeacher, noisy_BCTHW: Tensor, text_BLD: Tensor) -> Features:
        found.append(len(noisy_BCTHW))
        return encode(teacher, noisy_BCTHW, text_BLD)

    monkeypatch.setattr(DiffusionTeacher, "encode", counted)
    return found


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_the_mean_is_kept_in_full_precision(make: Make, dtype: str) -> None:
    settings = f"data.cache.dtype={dtype}"
    build_cache([make(settings)])
    run = build_run(make(settings, "data.cache.mode=require"))
    (read,) = run.alignment.reads(0)
    values = run.caches.values
    kept = [kept_features(values, read, run.clips[i].pixels) for i in range(len(run.clips))]
    mean_D = torch.stack(kept).flatten(0, 2).double().mean(0).float()
    torch.testing.assert_close(run.clips.centre_of(read), mean_D, rtol=0, atol=0)
    exact = build_run(make())  # of features that are not rounded
    assert exact.clips.centre_key(read) != run.clips.centre_key(read)


def test_ranks_take_the_mean_of_the_first(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(make("data.cache.mode=off"))
    (read,) = run.alignment.reads(0)
    encoded, mean_D = count_encodings(monkeypatch), torch.arange(48.0)
    monkeypatch.setattr(run.ranks, "on_main", lambda work, *of: mean_D)
    check_teachers_and_eval(run)
    assert torch.equal(run.clips.centre_of(read), mean_D)
    assert encoded == [2]  # of noise


def test_it_waits_for_no_gpu(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(make("data.cache.mode=off"))
    (read,) = run.alignment.reads(0)
    teacher, clip = run.alignment.teachers["dit"], run.clips[0]
    assert isinstance(teacher, DiffusionTeacher)
    run.clips.centre_of(read)
    teacher._late_model.loaded().to("meta")
    monkeypatch.setattr(teacher, "_device", torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta
    clip.features(read)  # what only the first pass does
    with HostSyncs() as syncs:
        assert clip.features(read).is_meta
    assert syncs.names == []


def test_it_resumes_exactly(make: Make, train_until: TrainUntil, tmp_path: Path) -> None:
    settings = (RANDOM, "steps=3", "eval.clips=1")
    whole = train(make(*settings, f"output={tmp_path / 'whole'}"))
    config = make(*settings, f"output={tmp_path / 'killed'}")
    train_until(config, 2)
    one, two = (timeless_contents(run / "checkpoints") for run in (whole, train(config)))
    assert one == two and any("step-000003" in name for name in one)


def test_nothing_of_it_is_exported_or_kept(make: Make, wan_folder: Path, tmp_path: Path) -> None:
    run = train(make(RANDOM))
    out = export(run, tmp_path / "out")
    assert file_contents(out).keys() == file_contents(wan_folder).keys() | {"model_card.md"}
    kept = load_file(run / "checkpoints" / "step-000002" / "objectives.safetensors")
    assert kept and all(name.startswith("objective_p.") for name in kept)
    inputs = {one.name: one.files for one in read_inputs(make(), fetch=True)}
    assert "diffusion_pytorch_model.safetensors" in inputs["teachers.dit"]


def test_encoders_are_what_is_measured_against(make: Make, make_config: MakeConfig) -> None:
    """Also behind a diffusion teacher; a recipe without one says that nothing is."""
    config = make()
    (dino, dit) = config.teachers.items()
    swapped = config.model_copy(update={"teachers": dict([dit, dino])})
    assert swapped.measured_against == "dino"
    assert [score.alias for score in score_teachers(swapped, clips=2)[0]] == ["dino"]
    alone = config.model_copy(update={"teachers": dict([dit])})
    assert alone.measured_against is None
    notes = build_run(alone).notes
    assert any("no teacher of the recipe reads frames" in note for note in notes)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["eval.teacher=dit"], "eval.teacher: dit reads latents"),
        (
            ["objectives.ra={name: refalign, teacher: dit, blocks: [0]}"],
            "objectives.ra.teacher: dit takes whole clips, and references are images",
        ),
        (["teachers.dit.feature=pre_norm"], "'pre_norm' is not a feature of diffusion: layer:k"),
        (
            ["teachers.dit.feature=layer:4"],
            "teachers.dit.feature: no layer:4; the model has 0 to 3",
        ),
        (["teachers.dit.noise_level=1"], "teachers.dit.noise_level"),
        (["teachers.dit.grid=[3,3]"], "grid: nothing reads it with family: diffusion"),
        (["teachers.dino.centred=true"], "centred: nothing reads it with family: dinov2"),
        (["data.size=[48, 528]", "model.path=WIDE"], "33 positions, the transformer of"),
    ],
)
def test_what_it_cannot_do_is_refused(
    recipe_file: Path, wan_folder: Path, tmp_path: Path, settings: list[str], expected: str
) -> None:
    wide = Path(shutil.copytree(wan_folder, tmp_path / "wide"))
    config = wide / "transformer" / "config.json"
    config.write_text(
        config.read_text().replace('"rope_max_seq_len": 32', '"rope_max_seq_len": 64')
    )
    row = f"teachers.dit={{family: diffusion, path: {wan_folder}, feature: 'layer:1'}}"
    given = [one.replace("WIDE", str(wide)) for one in settings]
    line = refused("train", recipe_file, f"output={tmp_path}", row, *REPA, RANDOM, *given)
    assert expected in line


@pytest.mark.parametrize("part", diffusion.ENCODERS)
def test_a_teacher_with_other_encoders_is_refused(
    recipe_file: Path, wan_folder: Path, tmp_path: Path, part: str
) -> None:
    if part == "tokenizer":
        other = Path(shutil.copytree(wan_folder, tmp_path / "other"))
        (other / part / "more.txt").write_text("more")
    else:
        other = changed(wan_folder, tmp_path / "other", part)
    row = f"teachers.dit={{family: diffusion, path: {other}, feature: 'layer:1'}}"
    line = refused("train", recipe_file, f"output={tmp_path}", row, *REPA)
    assert f"{other} has another {part}; take a teacher that was trained with the same" in line
