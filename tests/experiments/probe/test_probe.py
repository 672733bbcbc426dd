"""`alignlab probe`: its numbers are those of the evaluation, its pictures show what they say."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from alignlab.evaluation.evaluate import PROBE_SIGMAS
from alignlab.evaluation.feature_maps import pca_colours, tsne_points
from alignlab.evaluation.probe import SIGMAS, RunProbe, probe_run
from alignlab.evaluation.teacher_score import score_teachers
from alignlab.experiments.probe.page import write_probe
from alignlab.recipe import load_run
from alignlab.train import train
from command_line import alignlab
from run_contents import read_table

Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`trained("name=x", ...)` is the folder of a finished run of two steps."""
    output = tmp_path_factory.mktemp("probed")

    def finished(*overrides: str) -> Path:
        common = [f"output={output}", "data.references=[3,3]", "eval.sample_clips=1"]
        return train(load_run(recipe_file, [*common, *overrides]))

    return finished


@pytest.fixture(scope="module")
def run(trained: Trained) -> Path:
    return trained("name=aligned", "optim.lr=1e-2")


@pytest.fixture(scope="module")
def found(run: Path) -> RunProbe:
    return probe_run(run)


def test_the_command_writes_map_and_page(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = alignlab("probe", run, "--out", out, "--teacher", "dino", "--block", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"probe: {tmp_path / 'out' / 'probe.html'}\n"
    rows = read_table(tmp_path / "out" / "probe.csv")
    cells = {(r["measure"], r["model"], int(r["block"]), float(r["sigma"])) for r in rows}
    assert len(cells) == len(rows)
    measures = ("cknna", "cka", "teacher_retrieval", "silhouette", "cross_cos")
    assert cells == {
        (measure, model, block, sigma)
        for measure in measures
        for model in ("before", "after")
        for block in range(4)
        for sigma in SIGMAS
    }
    assert all(int(r["depth"]) == int(r["block"]) + 1 and r["teacher"] == "dino" for r in rows)
    page = (tmp_path / "out" / "probe.html").read_text()
    assert "block 1 (depth 2)" in page and "<video" in page and "http-equiv" in page


def test_after_is_what_the_evaluation_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignlab.evaluation.probe.SIGMAS", PROBE_SIGMAS)
    means: dict[str, list[float]] = defaultdict(list)
    for cell in probe_run(run).cells:
        if cell.model == "after" and cell.measure != "teacher_retrieval":
            means[f"{cell.measure}/block{cell.block}"].append(cell.value)
    measured = json.loads((run / "result.json").read_text())["metrics"]
    for block in (0, 2):
        for measure in ("cknna", "silhouette", "cross_cos"):
            values = means[f"{measure}/block{block}"]
            expected = measured[f"{measure}/block{block}"]
            assert sum(values) / len(values) == pytest.approx(expected, abs=1e-6)


def by_model(found: RunProbe) -> dict[str, list[float]]:
    values: dict[str, list[float]] = defaultdict(list)
    for cell in found.cells:
        values[cell.model].append(cell.value)
    return values


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_before_is_the_model_that_training_started_from(
    trained: Trained, found: RunProbe, kind: str
) -> None:
    lora = ["model.train=lora"] if kind == "lora" else []
    still = probe_run(trained(f"name=still-{kind}", "optim.lr=1e-30", *lora))
    assert by_model(still)["after"] == by_model(still)["before"]
    assert by_model(found)["after"] != by_model(found)["before"]
    assert by_model(found)["before"] == pytest.approx(by_model(still)["before"], abs=1e-5)


def test_a_run_without_references_or_objectives(trained: Trained, tmp_path: Path) -> None:
    run = trained("name=bare", "objectives.ra.weight=0", "data.references=[0,0]")
    found = probe_run(run)
    assert {cell.measure for cell in found.cells} == {"cknna", "cka"} and found.tokens == {}
    page = write_probe(found, tmp_path).read_text()
    assert "Reference tokens by subject" not in page and "Features as colour" in page


def test_a_video_teacher_sees_video_tokens_alone(
    trained: Trained, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = tmp_path_factory.mktemp("vjepa2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        small = {f"pred_{key}": value // 2 or 1 for key, value in settings.items()}
        model = VJEPA2Model(VJEPA2Config(**settings, **small, crop_size=48, frames_per_clip=8))
    model.save_pretrained(folder)
    run = trained(
        "name=video", "data.frames=9", f"teachers.clip={{family: vjepa2, path: {folder}}}"
    )
    found = probe_run(run, teacher="clip")
    assert {cell.measure for cell in found.cells} == {"cknna", "cka", "silhouette", "cross_cos"}
    assert found.features.teacher_THWC.shape == found.features.real_THWC.shape == (9, 48, 48, 3)
    page = write_probe(found, tmp_path).read_text()
    assert "features of clip" in page and "Reference tokens by subject" in page
    scores = {score.alias: score for score in score_teachers(load_run(run / "recipe.yaml"))[0]}
    assert scores["clip"].grid[0] == 4 and scores["dino"].grid[0] == 9


def test_mistakes_are_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    for arguments, message in (
        ((str(tmp_path),), "is a folder with runs in it, not a run"),
        ((str(tmp_path / "nowhere"),), "no run there"),
        ((str(tmp_path / "begun"),), "the run has no checkpoint yet"),
        ((str(run), "--teacher", "dinno"), "did you mean 'dino'?"),
        (
            (str(run), "--block", "4"),
            "block 4 does not exist: this transformer has 4 blocks",
        ),
        ((str(run), "--out", str(tmp_path / "file")), "is a file"),
    ):
        result = alignlab("probe", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def rows_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_one_projection_colours_all_frames_and_both_models() -> None:
    shared = rows_of(0, 40, 12)
    (left, right), _ = pca_colours([shared, shared + 5.0])
    assert torch.equal(left, right)  # a shift takes up no component
    (first, second), _ = pca_colours([torch.cat([shared, shared[:7]]), rows_of(1, 30, 12)])
    assert torch.equal(first[:7], first[-7:]) and first.shape == (47, 3)
    assert second.dtype == torch.uint8


def test_components_come_in_order_of_variance() -> None:
    scales = torch.tensor([1.0, 0.5, 0.25, 1e-3, 1e-3])
    rows = rows_of(0, 400, 5) * scales
    (colours,), (explained,) = pca_colours([rows])
    assert explained > 0.999
    for channel in range(3):
        seen = torch.corrcoef(torch.stack([colours[:, channel].float(), rows[:, channel]]))[0, 1]
        assert seen.abs() > 0.98


def test_tsne_keeps_groups_together_and_repeats() -> None:
    centres = 4 * rows_of(0, 3, 16)
    labels = torch.arange(60) % 3
    features = centres[labels] + 0.1 * rows_of(1, 60, 16)
    points = tsne_points(features)
    assert torch.equal(points, tsne_points(features))
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert torch.equal(labels[distances.argmin(1)], labels)
