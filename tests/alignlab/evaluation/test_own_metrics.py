"""Metrics of other packages: measured, looked at, refused; and recipes that name them."""

import json
import math
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch

from alignlab.doctor import metric_states
from alignlab.errors import UserError
from alignlab.evaluation.evaluate import evaluate
from alignlab.evaluation.generation import generated_clip
from alignlab.evaluation.measured_names import measured_names
from alignlab.evaluation.own_metrics import installed_metrics
from alignlab.recipe import dump, load_run, recipe_hash
from alignlab.runs.run_folder import RunFolder
from alignlab.train import train
from alignlab.training.setup import build_run
from command_line import alignlab, refused
from made_packages import metric_package
from tiny_runs import MakeConfig

pytestmark = pytest.mark.usefixtures("shared_clips")

GENERATES = "eval.generated_clips=2"


def test_clips_are_measured_by_it_and_by_nothing_else_than_before(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    plain = make_config(GENERATES, "name=plain", aligned=False)
    plain_run = build_run(plain)
    before = evaluate(plain_run, RunFolder.create(plain).samples)
    entries = {
        "sharp": "tiny_metric:SHARP",
        "gap": "tiny_metric:GAP",
        "grey": "tiny_metric:GREY",
        "spoils": "tiny_metric:SPOILS",
        "small": "tiny_metric:SMALL",
        "few": "tiny_metric:FEW",
    }
    with metric_package(tmp_path / "installed", **entries):
        config = make_config(GENERATES, f"eval.metrics={list(entries)}", aligned=False)
        assert config.eval.metrics[0] == "sharp@tiny-metrics"
        run = build_run(config, plain_run.caches)  # whose real clips were not measured by it
        random_state = torch.get_rng_state()
        found = evaluate(run, RunFolder.create(config).samples)
        assert torch.equal(torch.get_rng_state(), random_state)
        with run.branch:
            clips = [generated_clip(run, run.branch, i) for i in range(2)]
        sharp = [float(clip.float().diff(dim=2).abs().mean()) for clip in clips]
        assert found["gen/sharp"] == pytest.approx(sum(sharp) / 2, rel=1e-6)
        assert found["gen_real/sharp"] != found["gen/sharp"]
        samples = [run.val_clips[i].sample for i in range(2)]
        shown = torch.stack([clip.float().mean((0, 1, 2)) for clip in clips]).mean(0)
        real = torch.stack([s.video_THWC.float().mean((0, 1, 2)) for s in samples]).mean(0)
        assert found["gen/gap"] == pytest.approx(float((shown - real).norm()), rel=1e-5)
        assert found["gen/grey"] == found["gen_real/grey"] > 0
        assert found["gen/small"] == 0.5
        assert found["gen/spoils"] == found["gen_real/spoils"]
        assert "gen/few" not in found
        names = {f"{kind}/{name}" for kind in ("gen", "gen_real") for name in entries}
        assert {k: v for k, v in found.items() if k not in names} == before
        assert set(measured_names(config)) - set(measured_names(plain)) == names


def test_what_it_gets_is_documented(make_config: MakeConfig, tmp_path: Path) -> None:
    with metric_package(tmp_path / "installed", spoils="tiny_metric:SPOILS"):
        config = make_config("eval.generated_clips=1", "eval.metrics=[spoils]", aligned=False)
        run = build_run(config)
        evaluate(run, RunFolder.create(config).samples)
        clip, sample = import_module("tiny_metric").SEEN[0], run.val_clips[0].sample
    assert clip.video_THWC.shape == clip.real_THWC.shape == (5, 48, 48, 3)
    assert clip.video_THWC.dtype == clip.real_THWC.dtype == torch.uint8
    assert (clip.key, clip.caption, clip.entities) == (sample.key, sample.caption, sample.entities)
    assert clip.masks_ETHW is not None and sample.masks_ETHW is not None
    assert torch.equal(clip.masks_ETHW, sample.masks_ETHW)
    assert [one.name for one in clip.references] == [one.name for one in sample.references]
    assert clip.references[0].image_HWC.shape == (48, 48, 3)
    assert clip.fps == config.data.fps and clip.device == run.device


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("NAN", "clip shapes-0-val-000000: gave nan, not one finite number"),
        ("VECTOR", "clip shapes-0-val-000000: gave values of shape (3,), not one finite number"),
        ("TEXT", "clip shapes-0-val-000000: gave 'good', not one finite number"),
        (
            "RAISES",
            "clip shapes-0-val-000000: it raised ValueError: no face in it (tiny_metric.py:",
        ),
        ("ENDS", "clip shapes-0-val-000000: it raised SystemExit: 3"),
        ("BAD_REDUCE", "reduce of 2 clips: gave [1.0, 2.0], not one finite number"),
    ],
)
def test_what_gives_no_number_is_refused_before_the_first_step(
    row: str, message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with metric_package(tmp_path / "installed", mine=f"tiny_metric:{row}"):
        config = make_config(GENERATES, "eval.metrics=[mine]", aligned=False)
        with pytest.raises(UserError) as error:
            train(config)
    told = str(error.value)
    assert told.startswith(f"eval.metrics: mine@tiny-metrics: {message}") and "\n" not in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_fails_after_the_training_is_measured_once_it_is_mended(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    asked = ("eval.generated_clips=1", "eval.metrics=[mine]")
    with metric_package(tmp_path / "installed", mine="tiny_metric:LATE"):
        with pytest.raises(UserError, match=r"it raised ValueError: this is no real clip"):
            train(make_config(*asked, aligned=False))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    with metric_package(tmp_path / "mended", mine="tiny_metric:SHARP"):
        folder = RunFolder.open(train(make_config(*asked, aligned=False)))
    assert folder.metrics.read_text().startswith(rows)
    result = folder.read_result()
    assert result is not None and result["metrics"]["gen/mine"] > 0


def test_one_without_a_value_is_left_out_and_told(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with metric_package(tmp_path / "installed", mine="tiny_metric:NONE"):
        config = make_config(GENERATES, "eval.metrics=[mine]", aligned=False)
        found = evaluate(build_run(config), RunFolder.create(config).samples)
    assert "gen/mine" not in found and "gen_real/mine" not in found
    assert "gen/mine: no value of 2 clips: it is left out" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("frechet", "tiny_metric:SHARP", "alignlab has that name already"),
        ("a:b", "tiny_metric:SHARP", "a name is made of letters, digits, _ and -"),
        ("t7", "tiny_metric:SHARP", "parts of metrics are named so (mean, t0 to t9, block0, ...)"),
        ("bad", "no_such_module:X", "cannot load no_such_module:X: No module named 'no_such_m"),
        ("bad", "broken_module:X", "cannot load broken_module:X: Own: no card"),
        ("bad", "tiny_metric:NOTHING", "cannot load tiny_metric:NOTHING: module 'tiny_metric' has"),
        ("bad", "tiny_metric:sharpness", "is no alignlab.metrics.plugins.ClipMetric"),
        ("bad", "tiny_metric:no_label", "has label '', which is no line of text"),
        ("bad", "tiny_metric:two_lines", r"has label 'a\nb', which is no line of text"),
        ("bad", "tiny_metric:no_side", "has better 'up': choose from lower, higher, none"),
        ("bad", "tiny_metric:no_headline", "has headline 1: choose True or False"),
        ("bad", "tiny_metric:no_function", "has a measure that is no function"),
        ("bad", "tiny_metric:no_argument", "has a measure that takes (), and is called with (clip"),
        ("bad", "tiny_metric:no_reduce", "has a reduce that takes (), and is called with (values"),
    ],
)
def test_a_bad_metric_is_a_line_and_keeps_nothing_else_from_running(
    name: str, value: str, message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    installed = tmp_path / "installed"
    with (
        metric_package(installed, "good-package", mine="tiny_metric:SHARP"),
        metric_package(installed, "bad-package", **{name: value}),
    ):
        (installed / "broken_module.py").write_text(
            "class Own(Exception): ...\nraise Own('no\\ncard')"
        )
        (problem,) = [one.problem for one in installed_metrics() if one.problem is not None]
        assert problem.startswith(f"package bad-package registers metric {name!r}: ")
        assert message in problem and "\n" not in problem
        assert metric_states() == {
            f"{name} (package bad-package 1.0)": problem,
            "mine (package good-package 1.0)": "works",
        }
        assert make_config(GENERATES, "eval.metrics=[mine]").eval.metrics
        if ":" not in name:
            with pytest.raises(UserError) as refusal:
                make_config(GENERATES, f"eval.metrics=[{name}]")
            assert str(refusal.value) == f"eval.metrics: {problem}"


def test_two_packages_cannot_share_the_name_of_a_metric(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with (
        metric_package(tmp_path / "installed", "one", mine="tiny_metric:SHARP"),
        metric_package(tmp_path / "installed", "two", mine="tiny_metric:GAP"),
    ):
        assert make_config(GENERATES, "eval.metrics=[mine]").eval.metrics == ("mine@one",)
        with pytest.raises(UserError, match=r"two registers metric 'mine': package one has that"):
            make_config(GENERATES, "eval.metrics=[mine@two]")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("[shrp]", "eval.metrics: unknown metric 'shrp', did you mean 'sharp'? valid: sharp"),
        ("[frechet]", "eval.metrics: gen/frechet is measured of every run that has what it"),
        ("[fast@quick]", "eval.metrics: 'fast' comes with the package quick, which is not"),
        ("[fast@tiny-metrics]", "eval.metrics: package tiny-metrics registers no metric 'fast'"),
        ("[sharp,sharp@Tiny_Metrics]", "eval.metrics: sharp is named twice"),
        ("sharp", "eval.metrics: expected a list, got 'sharp'"),
    ],
)
def test_a_name_that_no_recipe_can_have_is_one_line(
    asked: str, message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with metric_package(tmp_path / "installed", sharp="tiny_metric:SHARP"):
        with pytest.raises(UserError) as error:
            make_config(GENERATES, f"eval.metrics={asked}")
    assert str(error.value).startswith(message)


def test_a_metric_without_a_clip_to_measure_is_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with metric_package(tmp_path / "installed", sharp="tiny_metric:SHARP"):
        told = "metrics: no generated clip is measured by sharp@tiny-metrics: raise generated_clips"
        with pytest.raises(UserError, match=f"^eval: {told}, or remove metrics$"):
            make_config("eval.generated_clips=0", "eval.metrics=[sharp]")


def test_a_run_keeps_the_package_and_is_read_without_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with metric_package(tmp_path / "installed", sharp="tiny_metric:SHARP"):
        config = make_config(GENERATES, "eval.metrics=[sharp]", aligned=False)
        folder = RunFolder.open(train(config))
        assert recipe_hash(config) != recipe_hash(make_config(GENERATES, aligned=False))
    result = folder.read_result()
    assert result is not None and math.isfinite(result["metrics"]["gen/sharp"])
    assert result["own_metrics"]["sharp"] == {
        "package": "tiny-metrics",
        "version": "1.0",
        "label": "sharpness",
        "better": "higher",
        "headline": True,
        "unit": "grey levels",
    }
    assert folder.config() == config
    done = alignlab("export", folder.path, "--out", tmp_path / "exported")
    assert done.exit_code == 0, done.output
    told = "'sharp' comes with the package tiny-metrics, which is not installed here; there is none"
    assert refused("evaluate", folder.path) == f"error: eval.metrics: {told}\n"
    stored = tmp_path / "stored.yaml"
    stored.write_text(dump(config))
    with pytest.raises(UserError, match=f"^eval.metrics: {told}$"):
        load_run(stored)
    shutil.rmtree(tmp_path / "installed")
    with metric_package(tmp_path / "installed", sharp="tiny_metric:NEEDY"):
        line = "eval.metrics: sharp@tiny-metrics cannot be measured: weights.pt is not in ~/faces"
        assert refused("evaluate", folder.path) == f"error: {line}\n"
        assert metric_states() == {
            "sharp (package tiny-metrics 1.0)": "weights.pt is not in ~/faces"
        }


def test_a_finished_run_is_measured_by_it_later(make_config: MakeConfig, tmp_path: Path) -> None:
    run = train(make_config(GENERATES, aligned=False))
    assert "own_metrics" not in json.loads((run / "result.json").read_text())
    with metric_package(tmp_path / "installed", sharp="tiny_metric:SHARP"):
        out = tmp_path / "found.json"
        done = alignlab("evaluate", run, "eval.metrics=[sharp]", "--out", out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert math.isfinite(found["metrics"]["gen/sharp"])
    assert found["own_metrics"]["sharp"]["version"] == "1.0"


def test_list_shows_it_with_its_package(tmp_path: Path) -> None:
    entries = {"sharp": "tiny_metric:SHARP", "gone": "no_such_module:X"}
    with metric_package(tmp_path / "installed", **entries):
        table, as_json = alignlab("list", "metrics"), alignlab("list", "metrics", "--json")
    assert table.exit_code == as_json.exit_code == 0
    (line,) = [line for line in table.stdout.splitlines() if "gen/sharp" in line]
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    label = "sharpness (package tiny-metrics, with eval.metrics)"
    assert cells == ["gen/sharp", label, "grey levels", "higher"]
    rows = {row["name"]: row for row in json.loads(as_json.stdout)}
    assert rows["gen/sharp"]["package"] == "tiny-metrics" and "gen/gone" not in rows
    assert rows["val/flow"]["package"] is None
