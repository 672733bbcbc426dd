"""Stage 1 networks: losses, what they see and do not see, seeds, grids, folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.losses.stage1.folder import (
    INFO,
    WEIGHTS,
    Stage1Info,
    Stage1Teacher,
    load_stage1,
    read_stage1_info,
    save_stage1,
)
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig, flow_l1
from alignlab.losses.stage1.saliency_aligner import (
    SaliencyAligner,
    SaliencyAlignerConfig,
    saliency_bce,
)
from random_tensors import draw

ALIGNER = SaliencyAlignerConfig(
    teacher_dim=12, text_dim=6, depth_self=2, heads=3, hidden=8, embed_dim=5
)
HEAD = MotionHeadConfig(teacher_dim=12, width=4, hidden=8, decoder=6)
TEACHER = Stage1Teacher(family="tiny-dino", path="assets/tiny-dino", feature="post_norm")


def text(*lengths: int) -> Tensor:
    """Embeddings of texts of these lengths, zeros after the last token."""
    rows = draw(len(lengths), 7, 6, seed=1)
    for row, length in zip(rows, lengths, strict=True):
        row[length:] = 0
    return rows


def info_of(module: SaliencyAligner | MotionHead) -> Stage1Info:
    return Stage1Info(
        kind="sara" if isinstance(module, SaliencyAligner) else "moalign",
        teacher=TEACHER,
        teacher_dim=12,
        grid=(2, 3),
        text="assets/tiny-wan" if isinstance(module, SaliencyAligner) else None,
        module=module.config,
    )


def test_bce_reproduces_its_golden_value() -> None:
    saliency = 0.5 * torch.sin(torch.arange(1, 7, dtype=torch.float64)) + 0.5
    target = torch.tensor([1, 0, 1, 0, 1, 0], dtype=torch.float64)
    both = torch.stack([saliency, target]).clamp(1e-300, 1 - 1e-16).view(2, 3, 2)
    loss_B = saliency_bce(torch.logit(both), target.view(1, 3, 2).expand(2, -1, -1))
    assert loss_B[0].item() == pytest.approx(1.36648615, abs=5e-9)
    assert loss_B[1].item() == pytest.approx(0, abs=1e-12)


def test_bce_is_float32_and_checks_shapes() -> None:
    loss_B = saliency_bce(draw(2, 3, 4).bfloat16() * 100, torch.ones(2, 3, 4))
    assert loss_B.dtype == torch.float32 and loss_B.isfinite().all()
    with pytest.raises(ValueError, match="differ"):
        saliency_bce(draw(2, 3, 4), draw(2, 4, 3))


def test_flow_l1_is_the_mean_of_absolute_differences() -> None:
    pred, target = draw(2, 3, 4, 2), draw(2, 3, 4, 2, seed=1)
    expected = [
        sum(abs(a - b) for a, b in zip(p, t, strict=True)) / 24
        for p, t in zip(pred.flatten(1).tolist(), target.flatten(1).tolist(), strict=True)
    ]
    assert flow_l1(pred, target).tolist() == pytest.approx(expected)
    for wrong in (target[:, 1:], target.transpose(1, 2)):
        with pytest.raises(ValueError, match="equal shapes"):
            flow_l1(pred, wrong)
    with pytest.raises(ValueError, match="with a step"):
        flow_l1(pred[:, :0], target[:, :0])


@pytest.mark.parametrize("attention", ["clip", "frame"])
@pytest.mark.parametrize(("frames", "tokens"), [(3, 4), (1, 1), (5, 15)])
def test_aligner_gives_shapes_on_any_grid(attention: str, frames: int, tokens: int) -> None:
    aligner = SaliencyAligner(ALIGNER.model_copy(update={"attention": attention}))
    teacher = draw(2, frames, tokens, 12)
    logits, visual = aligner(teacher, text(7, 3))
    assert logits.shape == (2, frames, tokens) and visual.shape == (2, frames, tokens, 12)
    saliency = aligner.saliency(teacher, text(7, 3))
    torch.testing.assert_close(saliency, logits.sigmoid())
    assert 0 < saliency.min() and saliency.max() < 1
    one_by_one = torch.cat([aligner(teacher[i, None], text(7, 3)[i, None])[0] for i in range(2)])
    torch.testing.assert_close(logits, one_by_one)


def test_aligner_ignores_padding_of_the_text() -> None:
    aligner, teacher = SaliencyAligner(ALIGNER), draw(2, 3, 4, 12)
    padded = text(4, 2)
    output = aligner(teacher, padded)
    cut = aligner(teacher[1:], padded[1:, :2])
    torch.testing.assert_close(output.logits_BTP[1:], cut.logits_BTP)
    for ours, theirs in zip(
        aligner.embed(output, padded), aligner.embed(cut, padded[1:, :2]), strict=True
    ):
        torch.testing.assert_close(ours[1:], theirs)
    other_words = padded.clone()
    other_words[1, 1] *= -1
    assert not torch.allclose(aligner(teacher, other_words).logits_BTP[1], output.logits_BTP[1])


def test_a_text_without_a_token_is_finite_with_finite_gradients() -> None:
    aligner = SaliencyAligner(ALIGNER)
    output = aligner(draw(2, 3, 4, 12), text(0, 3))
    visual, embedded = aligner.embed(output, text(0, 3))
    torch.autograd.backward(output.logits_BTP.sum() + visual.sum() + embedded.sum())
    for value in (*output, visual, embedded, *(p.grad for p in aligner.parameters())):
        assert value is not None and value.isfinite().all()


@pytest.mark.parametrize(("attention", "reaches"), [("clip", True), ("frame", False)])
def test_self_attention_sees_the_clip_or_the_frame(attention: str, reaches: bool) -> None:
    aligner = SaliencyAligner(ALIGNER.model_copy(update={"attention": attention}))
    teacher = draw(1, 3, 4, 12)
    changed = teacher.clone()
    changed[:, 2] += 1
    before, after = (aligner(x, text(3)).logits_BTP[:, 0] for x in (teacher, changed))
    assert torch.equal(before, after) is not reaches


def test_aligner_has_no_position_embedding() -> None:
    aligner, teacher = SaliencyAligner(ALIGNER), draw(1, 3, 4, 12)
    order = torch.tensor([2, 0, 3, 1])
    moved = aligner(teacher[:, :, order], text(5)).logits_BTP
    torch.testing.assert_close(moved, aligner(teacher, text(5)).logits_BTP[..., order])


def test_contrastive_gradient_leaves_the_saliency_head_alone() -> None:
    aligner = SaliencyAligner(ALIGNER)
    output = aligner(draw(2, 3, 4, 12), text(5, 3))
    visual, embedded = aligner.embed(output, text(5, 3))
    assert visual.shape == embedded.shape == (2, 5)
    torch.autograd.backward(visual.square().sum() + embedded.square().sum())
    assert all(p.grad is None for p in aligner.saliency_head.parameters())
    rest = {n: p.grad for n, p in aligner.named_parameters() if not n.startswith("saliency_head")}
    assert all(g is not None and g.abs().sum() > 0 for g in rest.values())


def test_visual_embedding_follows_the_saliency() -> None:
    aligner = SaliencyAligner(ALIGNER)
    output = aligner(draw(1, 1, 2, 12), text(5))
    only_first = output._replace(logits_BTP=torch.tensor([[[50.0, -50.0]]]))
    visual, _ = aligner.embed(only_first, text(5))
    torch.testing.assert_close(visual, aligner.visual_embed(output.visual_BTPD[:, 0, 0]))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads: 8 does not divide the teacher's width 12"):
        SaliencyAlignerConfig(teacher_dim=12, text_dim=6)


def test_defaults_are_the_papers() -> None:
    aligner = SaliencyAlignerConfig(teacher_dim=1664, text_dim=4096)
    assert (aligner.depth_cross, aligner.depth_self) == (2, 4)
    assert (aligner.heads, aligner.hidden) == (8, 512)
    assert MotionHeadConfig(teacher_dim=768).width == 64


@pytest.mark.parametrize("grid", [(3, 2, 2), (2, 1, 1), (6, 3, 5)])
def test_motion_head_gives_shapes_on_any_grid(grid: tuple[int, int, int]) -> None:
    head = MotionHead(HEAD)
    frames, height, width = grid
    motion = head.motion(draw(2, frames, height * width, 12), grid)
    assert motion.shape == (2, frames, height * width, 4)
    flow = head.flow(motion, grid)
    assert flow.shape == (2, frames - 1, height * width, 2)


def test_motion_head_reads_tokens_row_by_row() -> None:
    head, grid = MotionHead(HEAD), (4, 3, 9)
    teacher = draw(1, 4, 27, 12)
    changed = teacher.clone()
    changed[:, 0, 0] += 1  # the first frame's top left corner
    before, after = (head.motion(x, grid).view(4, 3, 9, 4) for x in (teacher, changed))
    near = (before != after).any(-1).nonzero().tolist()
    assert near == [[t, y, x] for t in (0, 1) for y in (0, 1) for x in (0, 1)]


def test_flow_of_constant_motion_is_constant_in_time() -> None:
    head, grid = MotionHead(HEAD), (5, 2, 2)
    still = head.flow(draw(1, 1, 4, 4).expand(1, 5, 4, 4), grid)
    nothing = head.decode(torch.zeros(1, 4, 4, 2, 2)).movedim(1, -1).flatten(2, 3)
    torch.testing.assert_close(still, nothing)


def test_motion_head_refuses_other_grids() -> None:
    head = MotionHead(HEAD)
    with pytest.raises(ValueError, match="do not fill"):
        head.motion(draw(1, 3, 4, 12), (3, 2, 3))
    with pytest.raises(ValueError, match="two time steps"):
        head.flow(draw(1, 1, 4, 4), (1, 2, 2))


@pytest.mark.parametrize("build", [SaliencyAligner, MotionHead])
def test_weights_come_from_the_seed_alone(build: Any) -> None:
    config: Any = ALIGNER if build is SaliencyAligner else HEAD
    before = torch.get_rng_state()
    first, again, other = build(config), build(config, seed=0), build(config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        if weight.ndim > 1:
            assert not torch.equal(weight, other.get_parameter(name))
            assert weight.std() > 0
        else:
            assert torch.equal(weight, torch.full_like(weight, float(not name.endswith("bias"))))
    assert not list(first.buffers())


@pytest.mark.parametrize(("kind", "module"), [("sara", ALIGNER), ("moalign", HEAD)])
def test_a_folder_gives_back_what_was_saved(kind: Any, module: Any, tmp_path: Path) -> None:
    built = (SaliencyAligner if kind == "sara" else MotionHead)(module, seed=3)
    save_stage1(tmp_path, built, info_of(built))
    assert sorted(p.name for p in tmp_path.iterdir()) == [WEIGHTS, INFO]
    loaded, info = load_stage1(str(tmp_path), kind)
    assert info == info_of(built) == read_stage1_info(tmp_path, kind)
    assert type(loaded) is type(built) and not loaded.training
    for name, weight in built.named_parameters():
        assert torch.equal(weight, loaded.get_parameter(name))
        assert not loaded.get_parameter(name).requires_grad


def refusal(folder: Path, kind: Any = "moalign") -> str:
    with pytest.raises(ValueError) as caught:
        load_stage1(folder, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def head_folder(tmp_path: Path) -> Path:
    head = MotionHead(HEAD)
    save_stage1(tmp_path, head, info_of(head))
    return tmp_path


def test_a_folder_of_the_other_kind_or_none_is_refused(head_folder: Path) -> None:
    assert "holds a Stage 1 of moalign, not of sara" in refusal(head_folder, "sara")
    assert "`alignlab stage1 sara RECIPE` makes one" in refusal(head_folder / "nowhere", "sara")


def test_missing_and_damaged_weights_are_refused(head_folder: Path) -> None:
    weights = head_folder / WEIGHTS
    whole = weights.read_bytes()
    for content in (b"", b"garbage", whole[:-1]):
        weights.write_bytes(content)
        assert f"{weights}: cannot be read" in refusal(head_folder)
    weights.unlink()
    assert f"{weights}: cannot be read" in refusal(head_folder)


def test_weights_of_another_shape_are_refused(head_folder: Path) -> None:
    wider = MotionHead(HEAD.model_copy(update={"decoder": 7}))
    info = read_stage1_info(head_folder, "moalign")
    save_stage1(head_folder, wider, info)
    assert "does not fit stage1.json, e.g. decode.0.bias" in refusal(head_folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"kind": "sara"}, "module is no SaliencyAlignerConfig"),
        ({"kind": "other"}, "kind: Input should be 'sara' or 'moalign'"),
        ({"teacher_dim": 13}, "teacher_dim 13 is not the module's 12"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_info_is_refused(
    head_folder: Path, change: dict[str, Any], expected: str
) -> None:
    path = head_folder / INFO
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert str(path) in refusal(head_folder) and expected in refusal(head_folder)
    path.write_text("not JSON")
    assert "Invalid JSON" in refusal(head_folder)
