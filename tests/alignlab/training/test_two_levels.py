"""Two noise levels in a sample: what is drawn, which tokens have which, what sees them and when."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.errors import UserError
from alignlab.train import RunTrainer
from alignlab.training.batches import Batch, training_batch
from alignlab.training.flow_matching import interpolate
from alignlab.training.setup import Run, build_run
from alignlab.training.two_levels import TwoLevels
from tiny_runs import MakeConfig

pytestmark = pytest.mark.usefixtures("shared_clips")

SELF_FLOW = "{name: self_flow, blocks: [0], deep_blocks: [2], projector_dim: 16, mask_ratio: 0.4}"
ALONE = ("objectives={}", "teachers={}", f"objectives.s={SELF_FLOW}")
KEPT = ("data.references=[2,2]", "flow.reference_dropout=0", "flow.both_dropout=0")


@pytest.fixture(scope="module")
def run(make_module_config: MakeConfig) -> Run:
    return build_run(make_module_config(*ALONE, *KEPT))


@pytest.fixture(scope="module")
def make_module_config(recipe_file: Any, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    from alignlab.recipe import load_run

    output = tmp_path_factory.mktemp("two-levels")
    return lambda *settings: load_run(recipe_file, [f"output={output}", *settings])


def first_batch(run: Run) -> Batch:
    return next(iter(RunTrainer(run).micro_batches()))


@contextmanager
def inputs(run: Run) -> Iterator[list[dict[str, Tensor]]]:
    """What the transformer is called with."""
    seen: list[dict[str, Tensor]] = []
    handle = run.wan.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    yield seen
    handle.remove()


def test_equal_timesteps_of_tokens_are_a_samples_timestep(run: Run) -> None:
    batch = first_batch(run)
    noisy = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B)
    assert batch.second is not None
    count = batch.second.has_BTHW[0].numel()
    timesteps_B = batch.sigma_B * 1000
    with run.branch, torch.no_grad():
        one, each = (
            run.branch(noisy, timesteps_B, batch.text_BLD, batch.references, tokens_BN=tokens_BN)
            for tokens_BN in (None, timesteps_B[:, None].expand(-1, count))
        )
    assert all(len(references) for references in batch.references)
    scale = one.velocity_BCTHW.abs().max()
    assert (one.velocity_BCTHW - each.velocity_BCTHW).abs().max() <= 1e-6 * scale


def test_the_student_sees_both_levels_and_the_average_the_cleaner_one(run: Run) -> None:
    batch = first_batch(run)
    assert batch.second is not None and batch.cleaner_B is None
    with inputs(run) as seen, run.branch:
        RunTrainer(run).losses(batch)
    student, average = seen
    has_BN = batch.second.has_BTHW.flatten(1)
    videos = has_BN.shape[1]
    assert 0 < has_BN.sum() < has_BN.numel()
    first_B, second_B = batch.sigma_B, batch.second.sigma_B
    assert not torch.equal(first_B, second_B)
    expected_BN = torch.where(has_BN, second_B[:, None], first_B[:, None]) * 1000
    assert torch.equal(student["timestep"][:, :videos], expected_BN)
    references_BM = student["timestep"][:, videos:]
    assert references_BM.shape[1] == 2 * videos // batch.latents_BCTHW.shape[2]
    assert torch.equal(references_BM, (first_B * 1000)[:, None].expand_as(references_BM))
    lower_B = torch.minimum(first_B, second_B)
    assert torch.equal(average["timestep"], lower_B * 1000)
    frames = batch.latents_BCTHW.shape[2]
    cleaner = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, lower_B)
    assert torch.equal(average["hidden_states"][:, :, :frames], cleaner)
    # every latent of a token by itself
    noisy, (height, width) = student["hidden_states"], batch.second.patch_HW
    for b, t, h, w in product(*map(range, batch.second.has_BTHW.shape)):
        has = bool(batch.second.has_BTHW[b, t, h, w])
        sigma = float(second_B[b] if has else first_B[b])
        rows, columns = (slice(p * n, p * n + n) for p, n in ((h, height), (w, width)))
        clean, noise = (x[b, :, t, rows, columns] for x in (batch.latents_BCTHW, batch.noise_BCTHW))
        found = noisy[b, :, t, rows, columns]
        torch.testing.assert_close(found, (1 - sigma) * clean + sigma * noise)


def test_a_masked_token_gets_its_own_level_in_the_forward_pass(run: Run) -> None:
    """Before any attention, another second level changes the masked tokens and no others."""
    batch = first_batch(run)
    assert batch.second is not None
    modulated: list[Tensor] = []
    block = run.wan.transformer.blocks[0]
    handle = block.attn1.register_forward_pre_hook(lambda module, args: modulated.append(args[0]))
    with run.branch, torch.no_grad():
        for sigma_B in (batch.second.sigma_B, batch.second.sigma_B / 2):
            second = replace(batch.second, sigma_B=sigma_B)
            noisy, tokens_BN = second.mixed(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B)
            run.branch(
                noisy, batch.sigma_B * 1000, batch.text_BLD, batch.references, tokens_BN=tokens_BN
            )
    handle.remove()
    differs_BN = (modulated[0] != modulated[1]).any(-1)
    has_BN = batch.second.has_BTHW.flatten(1)
    assert torch.equal(differs_BN[:, : has_BN.shape[1]], has_BN)
    assert not differs_BN[:, has_BN.shape[1] :].any()


def test_levels_are_drawn_for_the_sample_and_change_no_other_draw(run: Run) -> None:
    assert run.self_teacher is not None
    draws = run.self_teacher.draws

    def batch(samples: range, **more: Any) -> Batch:
        return training_batch(
            run.clips, run.config.flow, seed=0, step=3, samples=samples, **{**draws, **more}
        )

    whole, alone, none = batch(range(2)), batch(range(1, 2)), batch(range(2), levels=None)
    assert whole.second is not None and alone.second is not None and none.second is None
    assert torch.equal(whole.second.sigma_B[1:], alone.second.sigma_B)
    assert torch.equal(whole.second.has_BTHW[1:], alone.second.has_BTHW)
    assert not torch.equal(whole.second.has_BTHW[0], whole.second.has_BTHW[1])
    for name in ("sigma_B", "noise_BCTHW", "text_BLD", "latents_BCTHW"):
        assert torch.equal(getattr(whole, name), getattr(none, name))


def test_the_share_of_tokens_is_the_mask_ratio_and_levels_are_the_runs(run: Run) -> None:
    flow = run.config.flow
    drawn = TwoLevels(0.1, (2, 2)).drawn(flow, (5, 32, 32), seed=1, step=0, samples=range(40))
    assert drawn.has_BTHW.shape == (40, 5, 16, 16)
    assert drawn.has_BTHW.double().mean().item() == pytest.approx(0.1, abs=0.005)
    assert (
        (drawn.sigma_B > 0) & (drawn.sigma_B <= 1)
    ).all() and drawn.sigma_B.unique().numel() > 20


@pytest.mark.parametrize(
    ("changed", "passes"),
    [("objectives.s.weight=0", 2), ("objectives.s.schedule={kind: stop_at, step: 1}", 1)],
)
def test_without_effect_the_input_is_that_of_plain_flow_matching(
    changed: str, passes: int, make_module_config: MakeConfig
) -> None:
    run = build_run(make_module_config(*ALONE, *KEPT, changed))
    run.state.step = 1
    batch = first_batch(run)
    with inputs(run) as seen, run.branch:
        RunTrainer(run).losses(batch)
    assert len(seen) == passes
    assert torch.equal(seen[0]["timestep"], batch.sigma_B * 1000)
    frames = batch.latents_BCTHW.shape[2]
    plain = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B)
    assert torch.equal(seen[0]["hidden_states"][:, :, :frames], plain)


def test_two_averages_and_a_cleaner_level_of_its_own_are_refused(
    make_module_config: MakeConfig,
) -> None:
    sra = "{name: sra, blocks: [0], deep_blocks: [1], projector_dim: 16}"
    with pytest.raises(UserError, match=r"^objectives: s, t each have a moving average of the"):
        make_module_config(*ALONE, f"objectives.t={sra}")
    with pytest.raises(UserError, match=r"objectives\.s\.cleaner"):
        make_module_config(*ALONE, "objectives.s.cleaner=0.2")
