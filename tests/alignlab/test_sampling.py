"""Clips from a trained run: files that play, and guidance that does what it says."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.recipe import load_run
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.run_folder import RunFolder
from alignlab.sampling import (
    Guidance,
    guidance_of,
    negative_text,
    sample_latents,
    sample_to_file,
)
from alignlab.training.setup import Run, build_run

MakeConfig = Callable[..., RunConfig]
WAN_DIGEST = "ce96e0324e4b54ce"
PROMPT = "a red striped circle moves left over a grey background"


def picture(path: Path, color: str, *, mode: str = "RGB") -> Path:
    ground = (90, 200, 90, 0) if mode == "RGBA" else "white"
    image = Image.new(mode, (48, 48), ground)
    ImageDraw.Draw(image).rectangle((10, 10, 29, 39), fill=color)
    image.save(path)
    return path


def frames(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        rate = container.streams.video[0].average_rate
    assert rate == 8
    return torch.stack([torch.from_numpy(frame) for frame in decoded])


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture(tmp_path_factory.mktemp("images") / "red.png", "red")


@pytest.fixture(scope="module")
def clip(full_run: Path, red: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip") / "new" / "clip.mp4"
    return sample_to_file(full_run, PROMPT, [red], out, steps=2)


def test_the_file_plays_and_has_the_recipes_size(clip: Path) -> None:
    assert frames(clip).shape == (5, 48, 48, 3)
    assert [p.name for p in clip.parent.iterdir()] == ["clip.mp4"]


def test_the_same_seed_gives_the_same_clip(
    full_run: Path, red: Path, clip: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    again = sample_to_file(full_run, PROMPT, [red], tmp_path / "again.mp4", steps=2)
    assert again.read_bytes() == clip.read_bytes()
    other = sample_to_file(full_run, PROMPT, [red], tmp_path / "other.mp4", steps=2, seed=1)
    assert not torch.equal(frames(other), frames(clip))


def test_every_condition_changes_the_clip(
    full_run: Path, red: Path, clip: Path, tmp_path: Path
) -> None:
    blue = picture(tmp_path / "blue.png", "blue")
    changes: dict[str, Callable[[Path], Path]] = {
        "prompt": lambda out: sample_to_file(full_run, "a", [red], out, steps=2),
        "reference": lambda out: sample_to_file(full_run, PROMPT, [blue], out, steps=2),
        "no reference": lambda out: sample_to_file(full_run, PROMPT, [], out, steps=2),
        "two references": lambda out: sample_to_file(full_run, PROMPT, [red, blue], out, steps=2),
        "steps": lambda out: sample_to_file(full_run, PROMPT, [red], out, steps=3),
        "text guidance": lambda out: sample_to_file(
            full_run, PROMPT, [red], out, steps=2, text_guidance=0.0
        ),
        "reference guidance": lambda out: sample_to_file(
            full_run, PROMPT, [red], out, steps=2, reference_guidance=0.0
        ),
        "negative prompt": lambda out: sample_to_file(
            full_run, PROMPT, [red], out, steps=2, negative_prompt="blue square"
        ),
        "preset": lambda out: sample_to_file(
            full_run, PROMPT, [red], out, steps=2, negative_prompt="wan"
        ),
    }
    seen = [frames(clip)]
    for name, change in changes.items():
        found = frames(change(tmp_path / f"{name}.mp4"))
        assert not any(torch.equal(found, other) for other in seen), name
        seen.append(found)


def test_the_negative_prompt_is_the_recipes_unless_given(
    make_config: MakeConfig, full_run: Path, red: Path, clip: Path, tmp_path: Path
) -> None:
    text = "blue square"
    given = sample_to_file(
        full_run, PROMPT, [red], tmp_path / "given.mp4", steps=2, negative_prompt=text
    )
    folder = RunFolder.create(make_config(f"eval.negative_prompt={text}"))
    shutil.copytree(full_run / "checkpoints", folder.checkpoints)
    for name, negative, expected in (("a", None, given), ("b", "", clip)):
        found = sample_to_file(
            folder.path, PROMPT, [red], tmp_path / f"{name}.mp4", steps=2, negative_prompt=negative
        )
        assert torch.equal(frames(found), frames(expected))


def test_wans_negative_prompt_is_known_by_name() -> None:
    """Its text is public: `sample_neg_prompt` of Wan 2.1's configs."""
    text = negative_text("wan")
    assert len(text) == 137 and text.count("\uff0c") == 27
    assert hashlib.sha256(text.encode()).hexdigest().startswith(WAN_DIGEST)
    assert [negative_text(prompt) for prompt in ("", "a blur")] == ["", "a blur"]


def test_a_run_that_trained_zeros_is_sampled_with_zeros(
    make_config: MakeConfig, full_run: Path, red: Path, clip: Path, tmp_path: Path
) -> None:
    folder = RunFolder.create(make_config("model.absent_references=zero"))
    shutil.copytree(full_run / "checkpoints", folder.checkpoints)
    for references in ([red], []):
        plain, zero = (
            sample_to_file(path, PROMPT, references, tmp_path / f"{name}.mp4", steps=2)
            for name, path in (("plain", full_run), ("zero", folder.path))
        )
        assert not torch.equal(frames(plain), frames(zero))


def test_a_transparent_background_is_white(full_run: Path, clip: Path, tmp_path: Path) -> None:
    cut_out = picture(tmp_path / "cut.png", "red", mode="RGBA")
    found = sample_to_file(full_run, PROMPT, [cut_out], tmp_path / "cut.mp4", steps=2)
    assert torch.equal(frames(found), frames(clip))


def test_a_lora_run_samples_with_its_adapter(
    lora_run: Path, full_run: Path, red: Path, clip: Path, tmp_path: Path
) -> None:
    found = sample_to_file(lora_run, PROMPT, [red], tmp_path / "lora.mp4", steps=2)
    assert frames(found).shape == (5, 48, 48, 3)
    assert not torch.equal(frames(found), frames(clip))


def test_a_bf16_run_is_sampled(
    make_config: MakeConfig, full_run: Path, red: Path, clip: Path, tmp_path: Path
) -> None:
    # the same weights, so that only rounding differs
    folder = RunFolder.create(make_config("model.precision=bf16"))
    shutil.copytree(full_run / "checkpoints", folder.checkpoints)
    found = sample_to_file(folder.path, PROMPT, [red], tmp_path / "bf16.mp4", steps=2)
    assert not torch.equal(frames(found), frames(clip))
    assert (frames(found).float() - frames(clip).float()).abs().mean() < 5


@pytest.fixture(scope="module")
def run(recipe_file: Path) -> Run:
    return build_run(load_run(recipe_file, ["model.text_to_references=true"]))


def one_step(
    run: Run, text: float, reference: float, *, count: int = 2, precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """The velocity that one guided step used, and what the model says in the three cases."""
    clip = run.clips[0]
    rng = torch.Generator().manual_seed(3)
    noise = torch.randn(clip.latents_CTHW.shape, generator=rng)
    empty, references = run.clips.empty_text_LD, clip.references_KCHW[:count]
    with run.branch, torch.no_grad():
        guidance = Guidance(1, 5.0, text, reference, precision)
        end = sample_latents(run.branch, noise, clip.text_LD, empty, references, guidance)
        cases = ((empty, references[:0]), (empty, references), (clip.text_LD, references))
        separate = [
            run.branch(noise[None], torch.tensor([1000.0]), words[None], [images])
            for words, images in cases
        ]
    return noise - end, torch.cat([out.velocity_BCTHW for out in separate])


@pytest.mark.parametrize(
    ("text", "reference", "weights"),
    [
        (1.0, 1.0, (0.0, 0.0, 1.0)),  # plain conditional
        (0.0, 0.0, (1.0, 0.0, 0.0)),  # unconditional
        (0.0, 1.0, (0.0, 1.0, 0.0)),  # references alone
        (7.5, 5.0, (-4.0, -2.5, 7.5)),  # RefAlign's
    ],
)
def test_guidance_formula(
    run: Run, text: float, reference: float, weights: tuple[float, ...]
) -> None:
    used, cases = one_step(run, text, reference)
    assert (cases[0] - cases[1]).abs().max() > 1e-2 < (cases[1] - cases[2]).abs().max()
    expected = sum(w * case for w, case in zip(weights, cases, strict=True))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(used, expected, rtol=1e-4, atol=1e-4)


def test_reference_guidance_without_references_does_nothing(run: Run) -> None:
    one, two = one_step(run, 3.0, 5.0, count=0), one_step(run, 3.0, 0.0, count=0)
    torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-5)


def test_a_bf16_run_computes_in_bf16(run: Run, make_config: MakeConfig) -> None:
    assert guidance_of(make_config("model.precision=bf16")).precision == "bf16"
    with quiet_libraries():
        rounded, cases = one_step(run, 1.0, 1.0, precision="bf16")
    off = (rounded - cases[2]).norm() / cases[2].norm()
    assert 1e-4 < off < 3e-2


def test_sampling_follows_the_shift_of_training(make_config: MakeConfig) -> None:
    assert guidance_of(make_config("flow.shift=3")).shift == 3.0
    assert guidance_of(make_config("flow.sampler=uniform")).shift == 1.0


def test_what_cannot_be_sampled_is_said_in_one_line(
    full_run: Path, red: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out.mp4"
    text = tmp_path / "text.png"
    text.write_text("no image")
    empty = RunFolder.create(make_config()).path
    cases = [
        (full_run, [text], "text.png"),
        (full_run, [red, tmp_path / "gone.png"], "gone.png"),
        (tmp_path / "nowhere", [red], "no run there"),
        (empty, [red], "no checkpoint yet"),
    ]
    for run, references, message in cases:
        with pytest.raises(UserError, match=message) as refused:
            sample_to_file(run, PROMPT, references, out, steps=1)
        assert "\n" not in str(refused.value)
        assert not out.exists()


def test_several_ranks_do_not_write_the_same_video(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started as 2 processes"):
        sample_to_file(full_run, "a red circle", (), tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())
