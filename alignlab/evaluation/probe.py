"""A run looked into: which blocks see what the teacher sees, at which noise level.

Shape letters: B batch, N tokens, D student width, E teacher width, T, H, W, C frames.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from alignlab.config.data import unknown_name
from alignlab.config.run import RunConfig, check_block
from alignlab.errors import UserError
from alignlab.evaluation.collectors import ReferenceCollector, VideoCollector
from alignlab.evaluation.evaluate import denoise, eval_batch, teacher_of
from alignlab.evaluation.feature_maps import FeatureClip, feature_clip
from alignlab.evaluation.token_metrics import ReferenceTokens, agreement
from alignlab.metrics import cka
from alignlab.models.experts import WHOLE, Window
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.progress import step_progress
from alignlab.runs.checkpoint_folders import step_of, step_path
from alignlab.runs.input_record import tell_changes
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.run_folder import RunFolder, in_its_output
from alignlab.teachers import TEACHERS, Teacher
from alignlab.training.checkpoint import NEWEST, ModelChoice, load_transformer
from alignlab.training.encoded import Encoded
from alignlab.training.setup import Run, build_run

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of [0, 1]; with `model.expert` of its window
TOKEN_SIGMA = 0.5  # of the reference tokens that are shown one by one, likewise
MODELS = ("before", "after")  # the model that the run started from, and what it trained


@dataclass(frozen=True)
class Cell:
    """One number of the map.

    Args:
        measure: `cknna`, `cka`, `teacher_retrieval`, `silhouette` or `cross_cos`.
        model: of `MODELS`.
        block: 0-based; its output is measured.
        sigma: noise level, 1 is pure noise.
        value: see `probe_run`.
    """

    measure: str
    model: str
    block: int
    sigma: float
    value: float


@dataclass(frozen=True)
class RunProbe:
    """What `probe_run` found.

    Args:
        config: the run's recipe.
        step: of the checkpoint that was probed.
        teacher: alias of the teacher that tokens are compared with.
        num_blocks: of the transformer.
        aligned: blocks that the run's objectives align.
        clips: how many val clips were measured.
        cells: the map.
        chance: what `teacher_retrieval` gives by guessing; None where it was not measured.
        block: the block of `tokens` and `features`.
        tokens: foreground reference tokens at `token_sigma`, by model; empty without references.
        features: the block's video tokens and the teacher's as colours.
        sample: the clip that the run generated for the same prompt, an mp4; None if there is none.
        window: the noise levels that the run trained.
    """

    config: RunConfig
    step: int
    teacher: str
    num_blocks: int
    aligned: tuple[int, ...]
    clips: int
    cells: tuple[Cell, ...]
    chance: float | None
    block: int
    tokens: dict[str, ReferenceTokens]
    features: FeatureClip
    sample: Path | None
    window: Window = WHOLE

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise levels of the map."""
        return tuple(self.window.at(share) for share in SIGMAS)

    @property
    def token_sigma(self) -> float:
        """That of `tokens`."""
        return self.window.at(TOKEN_SIGMA)

    @property
    def feature_sigma(self) -> float:
        """That of the clip in `features`."""
        return self.window.at(FeatureClip.SIGMA)


@quiet_libraries()
@torch.no_grad()
def probe_run(
    run_dir: Path,
    *,
    teacher: str | None = None,
    block: int | None = None,
    choice: ModelChoice = NEWEST,
) -> RunProbe:
    """Measures every block of a run's model at five noise levels that it trains, before and after.

    On the first `eval.clips` val clips, with the noise of the evaluation: `cknna` (k = 10) and
    `cka` (unbiased) of video tokens against the teacher's tokens of the same places, about 2,048
    of them as in `VideoCollector`; `teacher_retrieval`, `silhouette` and `cross_cos` of foreground
    reference tokens as in `ReferenceCollector`, but with one noise level at a time, so that the
    linear map of `teacher_retrieval` is fitted on a third of the evaluation's tokens. Tokens of all
    blocks are held at once, of `eval.batch_size` clips.

    Args:
        run_dir: a run folder with a checkpoint.
        teacher: alias of the recipe; None takes `eval.teacher`, or else the first.
        block: whose tokens are shown one by one; None takes the last aligned block, or else the
            middle one.
        choice: which model of the run.

    Raises:
        UserError: no such run, checkpoint, teacher or block.
    """
    folder = RunFolder.open(run_dir)
    folder.check_split_rule()
    config = folder.config()
    choice.is_average(config.optim)
    choice.find(folder.checkpoints)  # both are refused before models are loaded
    alias = _teacher_alias(config, teacher)
    tell_changes(folder, config)
    run = build_run(in_its_output(folder, config))
    shown, loaded_teacher = _shown_block(run, block), teacher_of(run, alias)
    clips = [run.val_clips[i] for i in range(min(config.eval.clips, len(run.val_clips)))]
    batch = eval_batch(run, clips, [0], [run.window.at(FeatureClip.SIGMA)])
    maps, taps, every_block = {}, {}, range(run.wan.num_blocks)
    for model in MODELS:
        if model == "after":
            step = _load_chosen(run, folder, choice)
        run.wan.transformer.eval()
        with ReferenceBranch.of(run.wan.transformer, config.model, blocks=every_block) as branch:
            maps[model] = _measure(run, branch, clips, loaded_teacher, shown, model)
            taps[model] = denoise(run, branch, batch, capture=True).taps[shown]
    return RunProbe(
        config,
        step,
        alias,
        run.wan.num_blocks,
        run.alignment.blocks,
        len(clips),
        tuple(cell for measured in maps.values() for cell in measured.cells),
        maps["after"].chance,
        shown,
        {model: one.tokens for model, one in maps.items() if one.tokens is not None},
        feature_clip(taps, loaded_teacher, batch, clips[0]),
        *(_sample_of(folder, step, clips[0].pixels.key), run.window),
    )


def _load_chosen(run: Run, folder: RunFolder, choice: ModelChoice) -> int:
    """Puts the weights of a checkpoint into the run's transformer; gives its step."""
    is_average = choice.is_average(run.config.optim)
    with choice.reading(folder.checkpoints) as found:
        load_transformer(run.wan.transformer, found, ema=is_average)
        return step_of(found)


@dataclass(frozen=True)
class _Map:
    cells: list[Cell]
    chance: float | None
    tokens: ReferenceTokens | None


def _measure(
    run: Run,
    branch: ReferenceBranch,
    clips: list[Encoded],
    teacher: Teacher,
    shown: int,
    model: str,
) -> _Map:
    cells: list[Cell] = []
    chance, tokens = None, None
    size = run.config.eval.batch_size
    with step_progress(f"probe {model}", total=len(SIGMAS) * len(clips)) as advance:
        for place, share in enumerate(SIGMAS):
            sigma = run.window.at(share)
            references, videos = ReferenceCollector(), VideoCollector(len(clips))
            for start in range(0, len(clips), size):
                numbers = list(range(start, min(start + size, len(clips))))
                batch = eval_batch(run, clips, numbers, [sigma] * len(numbers))
                taps = denoise(run, branch, batch, capture=True).taps
                references.add(taps, batch, [clips[i] for i in numbers], numbers, teacher)
                videos.add(taps, batch, teacher)
                advance(place * len(clips) + numbers[-1] + 1, "")
            metrics = references.metrics()
            chance = metrics.get("teacher_retrieval_chance")
            cells += _cells(metrics, model, sigma) + _video_cells(videos, model, sigma)
            if share == TOKEN_SIGMA:
                tokens = references.tokens(shown)
    return _Map(cells, chance, tokens)


def _cells(metrics: dict[str, float], model: str, sigma: float) -> list[Cell]:
    """Cells of the metrics that are known by block."""
    named = [(key.split("/block"), value) for key, value in metrics.items() if "/block" in key]
    return [Cell(measure, model, int(b), sigma, value) for (measure, b), value in named]


def _video_cells(videos: VideoCollector, model: str, sigma: float) -> list[Cell]:
    cells = []
    for block, _, tokens in videos.tokens():
        cells.append(Cell("cknna", model, block, sigma, agreement(tokens)))
        whole = cka(tokens.student_ND, tokens.teacher.tokens_NE, unbiased=True)
        cells.append(Cell("cka", model, block, sigma, whole))
    return cells


def _teacher_alias(config: RunConfig, alias: str | None) -> str:
    alias = alias or config.measured_against
    if alias is None:
        raise UserError("teachers: the run's recipe has no encoder to compare the tokens with")
    if alias not in config.teachers:
        raise UserError(f"--teacher: {unknown_name('teacher', alias, config.teachers)}")
    if TEACHERS[config.teachers[alias].family].reads == "latents":
        raise UserError(f"--teacher: {alias} reads latents; a probe takes one that reads frames")
    return alias


def _shown_block(run: Run, block: int | None) -> int:
    count = run.wan.num_blocks
    if block is None:
        return max(run.alignment.blocks, default=count // 2)
    check_block("--block", block, count)
    return block


def _sample_of(folder: RunFolder, step: int, key: str) -> Path | None:
    """The clip that the model of this step has generated."""
    result = folder.read_result()
    if result is not None:
        folder.check_files(result)
    is_last = step == folder.config().steps
    samples = folder.samples if is_last else step_path(folder.samples, step)
    videos = [samples / clip["video"] for clip in folder.sample_list(samples) if clip["key"] == key]
    return videos[0] if videos and videos[0].is_file() else None
