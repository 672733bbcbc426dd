"""`alignlab teachers score`: a teacher's scores on a recipe's clips."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import Result

from alignlab.data.registry import build_dataset
from alignlab.evaluation.teacher_score import score_teachers
from alignlab.metrics import iicr
from alignlab.metrics.spatial import spatial_structure
from alignlab.recipe import load_run
from alignlab.teachers import load_teacher
from command_line import alignlab
from made_clips import Listed
from run_contents import read_table


def score(*arguments: str) -> Result:
    return alignlab("teachers", "score", *arguments)


def manhattan(size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Ordered pairs of different tokens with their distance."""
    places = [(h, w) for h in range(size[0]) for w in range(size[1])]
    return [
        (i, j, abs(a[0] - b[0]) + abs(a[1] - b[1]))
        for i, a in enumerate(places)
        for j, b in enumerate(places)
        if i != j
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_spatial_structure_is_what_plain_loops_find() -> None:
    size = (4, 5)
    tokens = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = [n % 3 == 0 or n in (1, 5) for n in range(20)]

    def cosine(i: int, j: int) -> float:
        return float(torch.cosine_similarity(tokens[i], tokens[j], dim=0))

    pairs = manhattan(size)
    by_step = {step: mean([cosine(i, j) for i, j, d in pairs if d == step]) for step in range(1, 8)}
    slope = sum((step - 4) * by_step[step] for step in by_step) / 28
    near = [cosine(i, j) for i, j, d in pairs if d <= 1]
    far = [cosine(i, j) for i, j, d in pairs if d >= 6]
    differences = []
    for anchor in range(20):
        own = [cosine(i, j) for i, j, d in pairs if i == anchor and d <= 1 and inside[j]]
        other = [cosine(i, j) for i, j, d in pairs if i == anchor and d >= 6 and not inside[j]]
        if inside[anchor] and own and other:
            differences.append(mean(own) - mean(other))
    assert 0 < len(differences) < sum(inside)  # some anchors lack one of the two
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    spread = mean([float((u - unit.mean(0)).square().sum()) for u in unit]) ** 0.5
    found = spatial_structure(tokens, size, torch.tensor(inside))
    assert found == pytest.approx(
        {
            "lds": mean(near) - mean(far),
            "cds": -slope,
            "srss": mean(differences),
            "rmsc": spread,
        }
    )


def test_srss_is_a_mean_over_anchors_that_have_both() -> None:
    """iREPA's own value; pooled over all pairs of the frame it would be 5/6."""
    tokens = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 1], [1, 1], [1, 1], [-1, 0], [0, -1]])
    found = spatial_structure(tokens.double(), (1, 8), (torch.arange(8) < 3).int())
    assert found["srss"] == pytest.approx(1.0)
    background = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1])  # token 6 is neither
    left = spatial_structure(tokens.double(), (1, 8), (torch.arange(8) < 3).int(), background)
    assert left["srss"] == pytest.approx(0.75)


def test_what_a_frame_does_not_have_is_left_out() -> None:
    tokens = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert spatial_structure(tokens, (3, 3), torch.ones(9)).keys() == {"cds", "rmsc"}
    assert spatial_structure(tokens[:1], (1, 1)).keys() == {"rmsc"}
    with pytest.raises(ValueError, match="do not fill"):
        spatial_structure(tokens, (2, 3))


def smooth(size: int) -> Tensor:
    """Tokens that turn slowly along both axes."""
    h, w = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angles = 0.2 * torch.stack([h.flatten(), w.flatten()], 1)
    return torch.cat([angles.cos(), angles.sin()], 1)


def test_tokens_that_follow_their_place_score_higher() -> None:
    tokens = smooth(8)
    shuffled = tokens[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    one, two = spatial_structure(tokens, (8, 8)), spatial_structure(shuffled, (8, 8))
    assert one["lds"] > two["lds"] + 0.2 and one["cds"] > two["cds"] + 0.02
    assert one["rmsc"] == pytest.approx(two["rmsc"])


def test_the_command_scores_every_teacher(recipe_file: Path, tmp_path: Path) -> None:
    folder = load_run(recipe_file).teachers["dino"].path
    other = f"teachers.first={{family: dinov2, path: {folder}, feature: 'layer:0'}}"
    out = tmp_path / "made" / "scores.csv"
    result = score(str(recipe_file), other, "--grid", "5x4", "--clips", "3", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "dino" in result.stdout and "first" in result.stdout and "5x5x4" in result.stdout
    rows = read_table(out)
    assert [row["teacher"] for row in rows] == ["dino", "first"]
    assert rows[0]["feature"] == "post_norm" and rows[1]["feature"] == "layer:0"
    for row in rows:
        assert (row["frames"], row["height"], row["width"]) == ("5", "5", "4")
        assert float(row["chance"]) == pytest.approx(4 / 14)
        assert row["iicr_15"] == "" and 0 <= float(row["iicr_8"]) <= 0.5
        assert all(row[name] for name in ("lds", "cds", "srss", "rmsc"))
        power = [float(row[name]) for name in row if name.startswith("power_")]
        assert len(power) == 4 and sum(power) == pytest.approx(1)
        assert float(row["seconds_per_clip"]) > 0 and row["peak_MiB"] == ""
    assert rows[0]["lds"] != rows[1]["lds"]
    assert rows[0]["cka_first"] == rows[1]["cka_dino"] and rows[0]["cka_dino"] == ""
    page = out.with_suffix(".html").read_text()
    assert str(out.with_suffix(".html")) in result.stdout
    # a real frame and two teachers of each clip, and of the charts two curves and one of pairs
    assert page.count('<img src="data:image/png') == 3 * 3 and page.count("<svg ") >= 3
    assert "Least alike" not in page and "Tells clips apart best" in page


def test_scores_are_the_measures_of_the_teachers_own_features(recipe_file: Path) -> None:
    config = load_run(recipe_file)
    (found,), _ = score_teachers(config, clips=2)
    assert found.grid == (5, 3, 3) and found.spatial.keys() == {"cds", "rmsc"}
    row = config.teachers["dino"]
    teacher = load_teacher(row.family, path=row.path, feature=row.feature)
    clips = build_dataset(config.data, "val")
    features = [teacher.encode(clips[i].video_THWC[None], (3, 3)).tokens_BTPD[0] for i in (0, 1)]
    pooled = torch.cat([tokens.mean(1) for tokens in features])
    assert found.iicr == {8: iicr(pooled, torch.arange(10) // 5, 8)}
    frames = [spatial_structure(frame, (3, 3))["cds"] for tokens in features for frame in tokens]
    assert found.spatial["cds"] == pytest.approx(mean(frames))


def test_a_comparison_is_scored_too_and_mistakes_are_one_line(
    recipe_file: Path, tmp_path: Path
) -> None:
    text = recipe_file.read_text() + "baseline: none\nseeds: [0]\nvariants: {none: {}}\n"
    comparison = tmp_path / "comparison.yaml"
    comparison.write_text(text)
    out = tmp_path / "teachers.csv"
    assert score(str(comparison), "--clips", "2", "--out", str(out)).exit_code == 0
    assert out.is_file()
    bare = tmp_path / "bare.yaml"
    bare.write_text("name: bare\nsteps: 1\nmodel: {path: x}\ndata: {name: shapes}\n")
    for arguments, message in (
        ((str(recipe_file), "--grid", "5"), "no height x width in patches"),
        ((str(bare),), "has none to score"),
        ((str(recipe_file), "data.val_clips=1", "eval.clips=1"), "two clips or more"),
    ):
        result = score(*arguments, "--out", str(out))
        assert result.exit_code == 2, result.output
        assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_undecided_tokens_are_no_background_of_srss(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run(recipe_file)
    row = config.teachers["dino"]
    teacher = load_teacher(row.family, path=row.path, feature=row.feature)
    val = build_dataset(config.data, "val")
    masks_ETHW = torch.zeros(1, 5, 48, 48, dtype=torch.bool)
    undecided_THW = torch.zeros(5, 48, 48, dtype=torch.bool)
    masks_ETHW[:, :, :16, :16] = True
    undecided_THW[:, 32:, 24:] = True
    samples = [
        replace(val[i], entities=("a",), masks_ETHW=masks_ETHW, undecided_THW=undecided_THW)
        for i in range(2)
    ]
    monkeypatch.setattr(
        "alignlab.evaluation.teacher_score.build_dataset", lambda *_, **__: Listed(samples)
    )
    (found,), _ = score_teachers(config, clips=2, size=(6, 6))
    inside = torch.zeros(6, 6)
    inside[:2, :2] = 1
    outside = 1 - inside
    outside[4:, 3:] = 0
    features = [teacher.encode(s.video_THWC[None], (6, 6)).tokens_BTPD[0] for s in samples]
    frames = [
        spatial_structure(frame, (6, 6), inside.flatten(), outside.flatten())["srss"]
        for tokens in features
        for frame in tokens
    ]
    assert found.spatial["srss"] == pytest.approx(mean(frames), rel=1e-5)
