"""A path given to `--out` that cannot be written is refused before any work."""

from pathlib import Path

import pytest

from alignlab.config.data import ShapesConfig
from alignlab.errors import UserError
from alignlab.experiments.data_preview import preview
from alignlab.export import export
from alignlab.runs.out_paths import check_out_file, check_out_folder
from alignlab.sampling import sample_to_file


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "nothing").symlink_to(tmp_path / "gone" / "deep")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip.gif", r"clip\.gif must end in \.mp4"),
        ("clip.webp", r"clip\.webp must end in \.mp4"),
        ("clip", r"clip must end in \.mp4"),
        ("folder", r"folder is a folder: name a \.mp4 file in it"),
        ("file/clip.mp4", r"file is a file, so .*clip\.mp4 cannot be made"),
        ("nothing/clip.mp4", r"nothing is a link to nothing"),
        ("x" * 300 + ".mp4", r"File name too long"),
    ],
)
def test_files(odd: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_out_file(odd / name, ".mp4")
    # the run is not looked at: it need not be there
    with pytest.raises(UserError, match=message):
        sample_to_file(odd / "run", "a cat", (), odd / name)
    assert (odd / "file").read_text() == "mine" and not list((odd / "folder").iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "file is a file: choose another"),
        ("file/deep", "file is a file, so"),
        ("nothing", "is a link to nothing"),
        ("x" * 300, "File name too long"),
    ],
)
def test_folders(odd: Path, name: str, message: str) -> None:
    for write in (
        lambda out: check_out_folder(out),
        lambda out: preview(ShapesConfig(), out, 1),
        lambda out: export(odd / "run", out),
    ):
        with pytest.raises(UserError, match=message):
            write(odd / name)


def test_what_can_be_written_is_let_through(odd: Path) -> None:
    check_out_file(odd / "new" / "deep" / "clip.MP4", ".mp4")
    check_out_folder(odd / "folder")
    check_out_folder(odd / "new" / "folder")
    check_out_file(Path("clip.mp4"), ".mp4")
    assert not (odd / "new").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("result.json", "history.json", "inputs.json", "mlflow_tags.json", "result-000006.json"),
        *("checkpoints/step-000002/state.json", "samples/new.json", "stage1/new.json"),
    ],
)
def test_what_a_run_keeps_is_not_overwritten(odd: Path, name: str) -> None:
    """Nor is it made where it is not there yet; what is for the user alone is let through."""
    run = odd / "folder"
    check_out_file(run / name, ".json")  # a folder as any other
    (run / "metrics.jsonl").touch()
    for out in (run / name, odd / "folder" / ".." / "folder" / name):
        with pytest.raises(UserError, match=r"is where alignlab itself keeps .*: choose another"):
            check_out_file(out, ".json")
    with pytest.raises(UserError, match=r"keeps samples of .*folder"):
        export(run, run / "samples" / "model")
    for free in ("evaluations/step-000002.json", "mine.json", "export/result.json"):
        check_out_file(run / free, ".json")


def test_what_a_comparison_or_a_stage_1_network_keeps_is_not_overwritten(odd: Path) -> None:
    for mark, kept in (("comparison.json", "table.csv"), ("stage1.json", "checksums.json")):
        folder = odd / mark.removesuffix(".json")
        folder.mkdir()
        (folder / mark).touch()
        with pytest.raises(UserError, match=f"keeps {kept} of"):
            check_out_file(folder / kept, Path(kept).suffix)
