"""`alignlab.attach` in a loop of one's own: a run's losses, and nothing that is left behind."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from alignlab import Alignment, Clips, attach
from alignlab.config.run import RunConfig
from alignlab.losses.objective import Features
from alignlab.losses.registry import BUILT_IN
from alignlab.recipe import load_run
from alignlab.teachers import Teacher, load_teacher
from alignlab.train import RunTrainer
from alignlab.training.batches import Batch
from alignlab.training.setup import Caches, Run, build_run, new_caches
from objective_settings import FEATURES, SETTINGS
from own_loops import (
    clips_of,
    flow_of,
    gradients,
    own_step,
    own_transformer,
    predicted,
    unequal,
)
from untrained_stage1 import write_untrained

# beyond the defaults: what else objectives read of clips
TAUGHT_BY_ITSELF = {name for name, row in BUILT_IN.items() if row.reads == "self"}  # refused
CASES = {
    name: f"name: {name}, {settings}"
    for name, settings in SETTINGS.items()
    if name not in TAUGHT_BY_ITSELF
} | {
    "sara-masks": "name: sara, blocks: [3], projector_dim: 32, saliency: masks",
    "refalign-foreground": "name: refalign, blocks: [1], foreground: 0.4, negatives: batch",
    "gated": "name: repa, blocks: [0], projector_dim: 8, weight: 2.0, gate: t^2, schedule: cosine",
}
REPA: dict[str, Any] = {"name": "repa", "teacher": "dino", "blocks": [1], "projector_dim": 8}
REFALIGN: dict[str, Any] = {"name": "refalign", "teacher": "dino", "blocks": [0, 2]}
STEPS = 3
# the run as an own loop does it: references are seen by the text, and never dropped
ALIKE = [
    f"steps={STEPS}",
    "model.text_to_references=true",
    "data.references=[2,2]",
    "flow.reference_dropout=0",
    "flow.both_dropout=0",
]

Attach = Callable[..., Alignment]


@pytest.fixture(scope="module")
def stage1(
    wan_folder: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("own-stage1")
    return write_untrained(
        folder, teacher=str(teacher_folder), dim=24, wan=str(wan_folder), text_dim=32
    )


@pytest.fixture(scope="module")
def base(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_run(recipe_file, [f"output={tmp_path_factory.mktemp('own-runs')}", *ALIKE])


@pytest.fixture(scope="module")
def caches(base: RunConfig) -> Caches:
    return new_caches(base)


@pytest.fixture(scope="module")
def run(base: RunConfig, caches: Caches) -> Run:
    return build_run(base, caches)


def batch_of(run: Run, step: int = 0) -> Batch:
    (batch,) = RunTrainer(run).micro_batches(step)
    return batch


@pytest.fixture(scope="module")
def batch(run: Run) -> Batch:
    return batch_of(run)


@pytest.fixture
def transformer(wan_folder: Path) -> WanTransformer3DModel:
    return own_transformer(wan_folder)


@pytest.fixture
def dino(teacher_folder: Path) -> dict[str, str]:
    return {"family": "dinov2", "path": str(teacher_folder), "feature": "post_norm"}


@pytest.fixture
def attached(transformer: WanTransformer3DModel, dino: dict[str, str]) -> Iterator[Attach]:
    """`attached({"repa": REPA}, ...)` on `transformer`, with the teacher `dino`."""
    made: list[Alignment] = []

    def attaching(objectives: dict[str, Any], **settings: Any) -> Alignment:
        fixed: dict[str, Any] = {"teachers": {"dino": dino}, "references": "after"}
        made.append(attach(transformer, objectives=objectives, **(fixed | settings)))
        return made[-1]

    yield attaching
    for alignment in made:
        alignment.taps.__exit__(None, None, None)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_a_run(
    case: str,
    base: RunConfig,
    caches: Caches,
    transformer: WanTransformer3DModel,
    dino: dict[str, str],
    stage1: Path,
) -> None:
    written = yaml.safe_load(f"{{{CASES[case].format(stage1=stage1)}}}")
    if BUILT_IN[written["name"]].reads == "teacher":
        written.setdefault("teacher", "dino")
    teachers = {"dino": dino} | {name: dino | {"feature": of} for name, of in FEATURES.items()}
    named = written.get("teacher", [])
    names = named if isinstance(named, list) else [named]
    teachers = {name: teachers[name] for name in names}
    config = RunConfig.model_validate(
        base.model_dump() | {"objectives": {"x": written}, "teachers": teachers}
    )
    run, step = build_run(config, caches), 1
    run.state.step = step
    batch = batch_of(run, step)
    with run.branch:
        expected, terms = RunTrainer(run).losses(batch)
        expected.backward()

    alignment = attach(
        transformer,
        objectives={"x": written},
        teachers=teachers,
        references="after",
        total_steps=STEPS,
        seed=config.seed,
    )
    loss, aligned = own_step(transformer, alignment, batch, step)
    loss.backward()
    assert torch.equal(loss, expected)
    found = aligned.sample_terms().values_of
    shared = {name: v for name, v in terms.values_of.items() if name not in FLOW}
    assert unequal(found, shared) == [] and "loss/x" in found
    mine = gradients(("transformer", transformer), ("objectives", alignment))
    theirs = gradients(("transformer", run.wan.transformer), ("objectives", run.alignment))
    assert unequal(mine, theirs) == []
    moved = {name for name, gradient in mine.items() if gradient.abs().sum() > 0}
    assert any(name.startswith("transformer.") for name in moved)
    learns = any(p.requires_grad for p in alignment.parameters())
    assert any(name.startswith("objectives.") for name in moved) == learns


FLOW = ("loss/total", "loss/flow")


def test_every_built_in_objective_is_a_case() -> None:
    assert set(BUILT_IN) - TAUGHT_BY_ITSELF <= set(CASES)


def test_samples_with_other_numbers_of_references_are_several_forward_passes(
    run: Run, attached: Attach, transformer: WanTransformer3DModel, batch: Batch
) -> None:
    none = batch.references[1][:0]
    mixed = Batch(**vars(batch) | {"references": [batch.references[0], none]})
    mixed = Batch(**vars(mixed) | {"names": [batch.names[0], []]})
    mixed = Batch(**vars(mixed) | {"referenced_B": torch.tensor([True, False])})
    with run.branch, torch.no_grad():
        _, terms = RunTrainer(run).losses(mixed)
    alignment = attached({"ra": REFALIGN})
    with alignment.recording():
        for row in range(2):
            one = Batch(
                **vars(mixed)
                | {
                    name: getattr(mixed, name)[row : row + 1]
                    for name in ("latents_BCTHW", "noise_BCTHW", "sigma_B", "text_BLD")
                }
                | {"references": mixed.references[row : row + 1]}
            )
            predicted(transformer, one)
    masks = [mixed.reference_masks[0], None]
    aligned = alignment(clips_of(mixed, reference_masks=masks), 0)
    assert torch.equal(aligned.terms["ra"].loss_B, terms["loss/ra"])
    assert aligned.counted["ra"].tolist() == [True, False]
    assert aligned.terms["ra"].loss_B[0] > 0 and aligned.terms["ra"].loss_B[1] == 0


def test_reference_frames_may_come_first(
    attached: Attach, transformer: WanTransformer3DModel, batch: Batch
) -> None:
    tokens: list[Tensor] = []
    handle = transformer.blocks[1].register_forward_hook(lambda m, i, out: tokens.append(out))
    alignment = attached({"ra": REFALIGN | {"blocks": [1]}, "repa": REPA}, references="before")
    with alignment.recording():
        predicted(transformer, batch, first=True)
    handle.remove()
    taps, grid = alignment._recorded.take(clips_of(batch), {"video", "reference"}, alignment.kinds)
    assert grid == (2, 3, 3)
    assert torch.equal(taps[1].reference.tokens_BND, tokens[0][:, : 2 * 9])
    assert torch.equal(taps[1].video.tokens_BND, tokens[0][:, 2 * 9 :])


def _hooks(model: nn.Module) -> dict[str, list[int]]:
    """By module and kind, the hooks that are there."""
    return {
        f"{name} {kind}": list(hooks)
        for name, module in model.named_modules()
        for kind, hooks in vars(module).items()
        if kind.endswith("hooks") and hooks
    }


def test_detached_the_transformer_is_as_it_was(
    attached: Attach, transformer: WanTransformer3DModel, batch: Batch
) -> None:
    handle = transformer.blocks[0].register_forward_hook(lambda m, i, out: None)  # the user's own
    with torch.no_grad():
        plain, hooks = predicted(transformer, batch), _hooks(transformer)
        processors, keys = dict(transformer.attn_processors), list(transformer.state_dict())
        alignment = attached({"ra": REFALIGN, "repa": REPA})
        assert _hooks(transformer) != hooks and list(transformer.state_dict()) == keys
        with alignment.recording():
            assert torch.equal(predicted(transformer, batch), plain)
        alignment(clips_of(batch), 0)
        alignment.detach()
        assert _hooks(transformer) == hooks and transformer.attn_processors == processors
        assert torch.equal(predicted(transformer, batch), plain)
        with pytest.raises(KeyError), alignment:  # attaches again
            assert _hooks(transformer) != hooks
            raise KeyError
    assert _hooks(transformer) == hooks
    handle.remove()
    assert not any(p is q for p in alignment.parameters() for q in transformer.parameters())


WATCHED = {"kind": "stop_at_plateau", "decay": 0.0, "patience": 1, "min_delta": 10.0}
CHANGING: dict[str, Any] = {
    "ra": REFALIGN | {"schedule": WATCHED},
    "repa": REPA | {"schedule": "linear", "gate": "t^2"},
}


def trained(
    wan: Path, dino: dict[str, str], batches: list[Batch], folder: Path, *, stop: int | None
) -> dict[str, Tensor]:
    """Weights after a training that saves its state after `stop` steps and is then built anew."""
    state: dict[str, Any] | None = None
    for steps in [range(STEPS)] if stop is None else [range(stop), range(stop, STEPS)]:
        transformer = own_transformer(wan)
        alignment = attach(
            transformer,
            objectives=CHANGING,
            teachers={"dino": dino},
            references="after",
            total_steps=STEPS,
            seed=3 if state is None else 4,  # what is loaded counts
        )
        parameters = [*transformer.parameters(), *alignment.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        parts: dict[str, Any] = {"t": transformer, "a": alignment, "o": optimizer}
        if state is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        for step in steps:
            loss, aligned = own_step(transformer, alignment, batches[step], step)
            assert ("ra" in aligned.terms) == (step < 2)  # then the plateau stops it
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            alignment.step_done(step, aligned)
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "state.pt")
        state = torch.load(folder / "state.pt", weights_only=True)
    assert state is not None
    return {f"{part}.{n}": value for part in ("t", "a") for n, value in state[part].items()}


def test_a_resumed_training_ends_as_the_uninterrupted_one(
    wan_folder: Path, dino: dict[str, str], run: Run, tmp_path: Path
) -> None:
    batches = [batch_of(run, step) for step in range(STEPS)]
    whole = trained(wan_folder, dino, batches, tmp_path, stop=None)
    assert unequal(trained(wan_folder, dino, batches, tmp_path, stop=1), whole) == []
    assert any(name.startswith("a.stop_ra") for name in whole)


def test_micro_batches_of_a_step_are_watched_together(
    attached: Attach, transformer: WanTransformer3DModel, run: Run
) -> None:
    objectives = {"ra": REFALIGN | {"schedule": WATCHED | {"patience": 9}}}
    alignment = attached(objectives)
    parts = [own_step(transformer, alignment, batch_of(run, i), 0)[1] for i in (0, 1)]
    alignment.step_done(0, *parts)
    seen = torch.cat([part.sample_terms()["sim/ra"] for part in parts]).mean()
    torch.testing.assert_close(alignment.weights.watches["ra"].average.float(), seen)


def test_scalars_are_means_and_hold_no_graph(
    attached: Attach, transformer: WanTransformer3DModel, batch: Batch
) -> None:
    alignment = attached({"ra": REFALIGN, "repa": REPA | {"weight": 3.0}})
    _, aligned = own_step(
        transformer, alignment, batch, references=[None, None], names=None, reference_masks=None
    )
    scalars = aligned.scalars()
    assert not any(value.requires_grad for value in scalars.values())
    assert {"loss/ra", "loss/ra/pull", "sim/ra", "loss/repa", "aligned/repa"} <= set(scalars)
    torch.testing.assert_close(aligned.loss, 3.0 * scalars["loss/repa"])
    assert aligned.loss.requires_grad and set(aligned.weighted) == {"ra", "repa"}
    assert scalars["aligned/ra"] == 0 and scalars["aligned/repa"] == 1
    assert scalars["sim/ra"].isnan()  # of no sample


# Other transformers, and wrapped ones


def _with_peft(model: nn.Module) -> Any:
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    return get_peft_model(model, lora)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", [DistributedDataParallel, fully_shard, _with_peft])
@pytest.mark.parametrize("is_first", [True, False])
def test_wrapped_transformers_give_the_same(
    wan_folder: Path,
    dino: dict[str, str],
    batch: Batch,
    wrapper: Callable[[nn.Module], Any],
    is_first: bool,
) -> None:
    """Attached before or after it is wrapped."""
    losses = []
    for wrap in (None, wrapper):
        torch.manual_seed(0)
        transformer: Any = own_transformer(wan_folder)
        if wrapper is _with_peft:  # the LoRA is not nothing
            transformer = _with_peft(transformer)
        elif wrap is not None and not is_first:
            transformer = wrap(transformer)
        objectives = {"ra": REFALIGN, "repa": REPA}
        alignment = attach(
            transformer, objectives=objectives, teachers={"dino": dino}, references="after"
        )
        if wrap is not None and is_first and wrapper is not _with_peft:
            transformer = wrap(transformer)
        loss, _ = own_step(transformer, alignment, batch)
        loss.backward()
        losses.append((loss.detach(), gradients(("", alignment))))
    torch.testing.assert_close(losses[0][0], losses[1][0])
    for name, gradient in losses[0][1].items():
        torch.testing.assert_close(losses[1][1][name], gradient, rtol=1e-4, atol=1e-6)


SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def small_clips() -> tuple[Tensor, Tensor, Clips]:
    """Latents and texts for a `SMALL` transformer, and what they show."""
    latents, text = torch.randn(1, 16, 2, 6, 6), torch.randn(1, 4, 8)
    frames = torch.randint(0, 256, (1, 5, 48, 48, 3), dtype=torch.uint8)
    return latents, text, Clips(torch.tensor([0.5]), latents.shape[2:], frames_BTHWC=frames)


def test_projectors_may_be_wrapped_in_ddp(
    attached: Attach, transformer: WanTransformer3DModel, batch: Batch, process_group: None
) -> None:
    alignment = attached({"repa": REPA})
    own_step(transformer, alignment, batch)[0].backward()
    expected = {n: g.clone() for n, g in gradients(("", alignment)).items()}
    alignment.zero_grad()
    wrapped = DistributedDataParallel(alignment)
    with alignment.recording():
        velocity = predicted(transformer, batch)
    aligned = wrapped(clips_of(batch), 1)
    (flow_of(velocity, batch) + aligned.loss_B).mean().backward()
    assert expected and unequal(gradients(("", alignment)), expected) == []


def test_gradient_checkpointing_may_run_blocks_again(
    attached: Attach, transformer: WanTransformer3DModel, batch: Batch
) -> None:
    found = []
    for checkpointing in (False, True):
        alignment = attached({"repa": REPA}, seed=1)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.zero_grad()
        own_step(transformer, alignment, batch)[0].backward()
        found.append(gradients(("t", transformer), ("a", alignment)))
        alignment.detach()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_image_to_video_and_vace_are_tapped_as_well(dino: dict[str, str]) -> None:
    latents, text, clips = small_clips()
    i2v = WanTransformer3DModel(
        in_channels=36, out_channels=16, image_dim=8, added_kv_proj_dim=24, **SMALL
    )
    vace = WanVACETransformer3DModel(vace_layers=[0], vace_in_channels=96, **SMALL)
    inputs: list[tuple[nn.Module, dict[str, Any]]] = [
        (
            i2v,
            {
                "hidden_states": torch.cat([latents, torch.randn(1, 20, 2, 6, 6)], 1),
                "encoder_hidden_states_image": torch.randn(1, 257, 8),
            },
        ),
        (vace, {"hidden_states": latents, "control_hidden_states": torch.randn(1, 96, 2, 6, 6)}),
    ]
    for model, arguments in inputs:
        with attach(model, objectives={"repa": REPA}, teachers={"dino": dino}) as alignment:
            with alignment.recording():
                model(timestep=torch.tensor([500.0]), encoder_hidden_states=text, **arguments)
            aligned = alignment(clips, 0)
            aligned.loss.backward()
        gradient = model.blocks[0].ffn.net[2].weight.grad  # type: ignore[union-attr,index]
        assert gradient is not None and gradient.abs().sum() > 0


class Patches:
    """A teacher of one's own: mean colours of patches."""

    dim, is_video, grid = 3, False, None

    def encode(self, frames_BTHWC: Tensor, grid_HW: tuple[int, int]) -> Features:
        batch, frames = frames_BTHWC.shape[:2]
        pixels = frames_BTHWC.flatten(0, 1).movedim(3, 1).float() / 255
        tokens = torch.nn.functional.adaptive_avg_pool2d(pixels, grid_HW).flatten(2).mT
        return Features(tokens.unflatten(0, (batch, frames)), (frames, *grid_HW))


def test_teachers_may_be_loaded_or_of_ones_own(
    attached: Attach,
    transformer: WanTransformer3DModel,
    batch: Batch,
    dino: dict[str, str],
) -> None:
    loaded: Teacher = load_teacher(**dino)  # type: ignore[arg-type]
    one, other = attached({"repa": REPA}), attached({"repa": REPA}, teachers={"dino": loaded})
    losses = [own_step(transformer, alignment, batch)[0] for alignment in (one, other)]
    assert torch.equal(*losses)
    alignment = attached({"repa": REPA, "ra": REFALIGN}, teachers={"dino": Patches()})
    _, aligned = own_step(transformer, alignment, batch)
    assert aligned.counted["repa"].all() and aligned.counted["ra"].all()
