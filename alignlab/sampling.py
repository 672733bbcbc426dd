"""Generated clips: Euler steps with separate guidance on text and references.

Shape letters: B batch, C channels, T, H, W of latents or pixels, K references, L text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.data.images import read_image
from alignlab.data.resize import fit_reference
from alignlab.data.video import write_mp4
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.distributed.launch_env import refuse_several_ranks
from alignlab.distributed.ranks import mixed_precision
from alignlab.errors import UserError
from alignlab.models.other_expert import OtherExpert, other_expert
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.text_encoder import warn_of_cut
from alignlab.models.wan import Wan, load_wan
from alignlab.progress import Advance, step_progress, warn_once
from alignlab.randomness import generator
from alignlab.runs.input_record import tell_changes
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.out_paths import out_file
from alignlab.runs.run_folder import RunFolder, in_its_output
from alignlab.training.checkpoint import NEWEST, ModelChoice, load_transformer
from alignlab.training.flow_matching import euler_sample
from alignlab.training.kept_text import kept_text

NEGATIVE_PROMPTS = {
    # `sample_neg_prompt` of Wan 2.1's configs (wan/configs/shared_config.py), which RefAlign's
    # inference scripts use as well; its commas are full-width.
    "wan": "\uff0c".join(
        (
            "色调艳丽 过曝 静态 细节模糊不清 字幕 风格 作品 画作 画面 静止 整体发灰 最差质量 "
            "低质量 JPEG压缩残留 丑陋的 残缺的 多余的手指 画得不好的手部 画得不好的脸部 "
            "畸形的 毁容的 形态畸形的肢体 手指融合 静止不动的画面 杂乱的背景 三条腿 "
            "背景人很多 倒着走"
        ).split()
    ),
}


@dataclass(frozen=True)
class Guidance:
    """How a clip is sampled.

    Args:
        steps: Euler steps (RefAlign: 50).
        shift: shift of the noise levels (RefAlign: 5, as in training).
        text: scale of the text's direction (RefAlign: 7.5).
        reference: scale of the references' direction (RefAlign: 5.0).
        precision: of the transformer, as in training.
        text_low, reference_low: scales of the low-noise expert (`model.expert`); None: as above,
            which are the high-noise expert's then.
    """

    steps: int
    shift: float
    text: float
    reference: float
    precision: str = "fp32"
    text_low: float | None = None
    reference_low: float | None = None

    def scales(self, *, low: bool) -> tuple[float, float]:
        """Those of text and references, by the low-noise expert or by the other."""
        text = self.text if self.text_low is None else self.text_low
        reference = self.reference if self.reference_low is None else self.reference_low
        return (text, reference) if low else (self.text, self.reference)


def guidance_of(config: RunConfig) -> Guidance:
    """The sampling settings of a recipe; the shift is the training's unless it has its own."""
    settings = config.eval
    trained = 1.0 if config.flow.sampler == "uniform" else config.flow.shift
    shift = trained if settings.sample_shift is None else settings.sample_shift
    return Guidance(
        settings.sample_steps,
        shift,
        settings.text_guidance,
        settings.reference_guidance,
        config.model.precision,
        settings.text_guidance_low,
        settings.reference_guidance_low,
    )


def negative_text(prompt: str) -> str:
    """The text of `eval.negative_prompt`: that of a preset, or else the prompt itself."""
    return NEGATIVE_PROMPTS.get(prompt, prompt)


@torch.no_grad()
def sample_latents(
    branch: ReferenceBranch,
    noise_CTHW: Tensor,
    text_LD: Tensor,
    negative_text_LD: Tensor,
    references_KCHW: Tensor,
    guidance: Guidance,
    *,
    other: OtherExpert | None = None,
    advance: Advance | None = None,
) -> Tensor:
    """Latents `(C, T, H, W)` of one clip.

    velocity = v(-, -) + reference (v(-, refs) - v(-, -)) + text (v(text, refs) - v(-, refs)),
    where - is the negative prompt (the empty one by default), and no references: none at all, or
    where the branch's `absent_references` is `zero` as many latents of zeros (RefAlign's code; of
    a clip without references one, as in training). The three run as one batch. At noise levels that
    are not the trained expert's, `other` takes the place of `branch`. `advance` is told the number
    of finished steps.
    """
    done = 0
    text_BLD = torch.stack([negative_text_LD, negative_text_LD, text_LD])
    is_zero = branch.absent_references == "zero"
    absent = torch.zeros_like(references_KCHW) if is_zero else references_KCHW[:0]
    references = [absent, references_KCHW, references_KCHW]

    def velocity_at(latents_CTHW: Tensor, sigma: float) -> Tensor:
        nonlocal done
        denoiser = branch if other is None else other.branch_at(sigma, branch)
        text, reference = guidance.scales(low=other is not None and other.is_low(sigma))
        timesteps_B = torch.full((3,), sigma * 1000, device=latents_CTHW.device)
        with mixed_precision(latents_CTHW.device, guidance.precision):
            out = denoiser(
                latents_CTHW.expand(3, *latents_CTHW.shape),
                timesteps_B,
                text_BLD,
                references,
                capture=False,
            )
        nothing, with_references, with_all = out.velocity_BCTHW
        done += 1
        if advance is not None:
            advance(done, "")
        from_references = reference * (with_references - nothing)
        from_text = text * (with_all - with_references)
        guided: Tensor = nothing + from_references + from_text
        return guided

    return euler_sample(velocity_at, noise_CTHW, steps=guidance.steps, shift=guidance.shift)


@quiet_libraries()
def sample_to_file(
    run_dir: Path,
    prompt: str,
    reference_paths: Sequence[Path],
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    text_guidance: float | None = None,
    reference_guidance: float | None = None,
    negative_prompt: str | None = None,
    choice: ModelChoice = NEWEST,
) -> Path:
    """Generates one clip with the model of a run and writes it as mp4.

    Args:
        run_dir: a run folder.
        prompt: what the clip shows.
        reference_paths: images of the subjects; a transparent background becomes white.
        out: the mp4 to write.
        seed: of the starting noise.
        steps: Euler steps; None takes the recipe's, as do the two guidance scales.
        text_guidance: see `Guidance`; of both experts, where there are two.
        reference_guidance: likewise.
        negative_prompt: a text, or the name of a preset (`NEGATIVE_PROMPTS`); None takes the
            recipe's.
        choice: which model of the run.

    Raises:
        UserError: no such run or checkpoint, an image that cannot be read, or `out` is no mp4 file
            that can be written.
    """
    asked = {"steps": steps, "text": text_guidance, "reference": reference_guidance}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    given |= {f"{name}_low": value for name, value in given.items() if name != "steps"}
    with out_file(out, ".mp4"):
        folder = RunFolder.open(run_dir)
        config = in_its_output(folder, folder.config())
        guidance = replace(guidance_of(config), **given)
        wan = load_trained(run_dir, choice)
        negative = config.eval.negative_prompt if negative_prompt is None else negative_prompt
        video_THWC = _sampled(wan, config, guidance, prompt, negative, reference_paths, seed)
        write_mp4(out, video_THWC, config.data.fps)
    return out


def _sampled(
    wan: Wan,
    config: RunConfig,
    guidance: Guidance,
    prompt: str,
    negative: str,
    reference_paths: Sequence[Path],
    seed: int,
) -> Tensor:
    """A clip, uint8 `(T, H, W, C)` on the CPU."""
    images = [fit_reference(*read_image(path), config.data.size)[0] for path in reference_paths]
    references = [wan.encode_image(image_HWC) for image_HWC in images]
    noise = torch.randn(latent_shape(wan, config), generator=generator(seed, "sample"))
    texts = {"--negative-prompt": negative_text(negative), "--prompt": prompt}
    warn_of_cut(wan.text, texts)
    negative_LD, text_LD = _embedded(wan, config, list(texts.values()))
    stacked = torch.stack(references) if references else noise[None, :, 0][:0].to(wan.device)
    with (
        ReferenceBranch.of(wan.transformer, config.model) as branch,
        other_expert(wan, config.model, keeps=False) as other,
        step_progress("sample", total=guidance.steps) as advance,
    ):
        latents = sample_latents(
            branch,
            noise.to(wan.device),
            text_LD,
            negative_LD,
            stacked,
            guidance,
            other=other,
            advance=advance,
        )
    return wan.decode(latents).cpu()


def _embedded(wan: Wan, config: RunConfig, texts: Sequence[str]) -> list[Tensor]:
    """Embeddings of texts, (L, D) each; those that the run's cache has need no text encoder.

    The text encoder is freed, unless the recipe keeps it.
    """
    cache = config.data.cache
    off = cache.model_copy(update={"mode": "off"})
    read = off if cache.mode == "off" else cache.model_copy(update={"mode": "read"})
    try:
        values = EncodedValues.of(read, config.output)
    except UserError as error:  # nothing else is read from there
        warn_once(f"the prompts are encoded without the dataset cache: {error}")
        values = EncodedValues.of(off, config.output)
    embedded = [kept_text(values, wan.text, text).to(wan.device) for text in texts]
    if config.model.text_encoder != "keep":
        wan.text.late_model.free()
    return embedded


@quiet_libraries()
def load_trained(run_dir: Path, choice: ModelChoice = NEWEST) -> Wan:
    """A model of a run.

    Raises:
        UserError: there is no such checkpoint, or no moving average.
    """
    refuse_several_ranks()  # each would write the same file
    folder = RunFolder.open(run_dir)
    config = folder.config()
    is_average, _ = choice.is_average(config.optim), choice.find(folder.checkpoints)
    tell_changes(folder, config, model_only=True)
    wan = load_wan(
        config.model.path,
        expert=config.model.expert,
        train=config.model.train,
        lora=config.model.lora,
        attention=config.model.attention,
        precision=config.model.precision,
        weights=config.model.weights,
        device="cuda" if torch.cuda.is_available() else "cpu",
        seed=config.seed,
        init=config.model.init,
        text_encoder=config.model.text_encoder,
        parks_vae=True,
        load_frozen=False,
    )
    with choice.reading(folder.checkpoints) as found:
        load_transformer(wan.transformer, found, ema=is_average)
    wan.transformer.eval()
    return wan


def latent_shape(wan: Wan, config: RunConfig) -> tuple[int, int, int, int]:
    """`(C, T, H, W)` of the latents of a clip of the recipe's size."""
    frames, height, width = wan.latent_grid(config.data.frames, *config.data.size)
    patch = wan.transformer.config.patch_size
    return (
        int(wan.frozen.vae_config["z_dim"]),
        frames * patch[0],
        height * patch[1],
        width * patch[2],
    )
