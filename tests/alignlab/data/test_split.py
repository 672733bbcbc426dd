"""Which clips of a folder are held out: exact shares, whole groups, and what rows say."""

import os
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch

from alignlab.config.data import FolderConfig
from alignlab.config.run import RunConfig
from alignlab.data.folder import FolderDataset
from alignlab.data.metadata import read_rows
from alignlab.data.split import deal, num_held_out
from alignlab.data.video import write_mp4
from alignlab.errors import UserError
from alignlab.evaluation.probe import probe_run
from alignlab.recipe import dump
from alignlab.runs.run_folder import RunFolder

Rows = list[dict[str, Any]]
HEADER = "file_name,caption,split,group"


def write_csv(root: Path, *lines: str, header: str = HEADER) -> Path:
    (root / "metadata.csv").write_text("\n".join([header, *lines, ""]))
    return root


def splits(root: Path, val_fraction: float = 0.5) -> dict[str, str]:
    """Split of each row by its caption."""
    rows = read_rows(root, "metadata.csv")
    dealt = deal(rows, root, val_fraction)
    return {row.caption: split for row, split in zip(rows, dealt, strict=True)}


def clips(root: Path, *names: str) -> Path:
    """Files that stand for videos, which dealing does not read."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def test_the_share_is_exact(tmp_path: Path) -> None:
    names = [f"clips/c{i}.mp4" for i in range(6)]
    clips(tmp_path, *names)
    write_csv(tmp_path, *(f"{name},{name},," for name in names))
    assert sorted(splits(tmp_path, 0.34).values()) == ["train"] * 4 + ["val"] * 2
    held_out = {f: {k for k, v in splits(tmp_path, f).items() if v == "val"} for f in (0.34, 0.7)}
    assert held_out[0.34] < held_out[0.7]


@pytest.mark.parametrize(
    ("groups", "fraction", "held_out"),
    [(1, 0.9, 1), (2, 0.01, 1), (2, 0.99, 1), (6, 0.34, 2), (4, 0.125, 1), (20, 0.125, 3)],
)
def test_one_at_least_is_on_each_side(groups: int, fraction: float, held_out: int) -> None:
    assert num_held_out(groups, fraction) == held_out


def test_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    names = [f"{i}.mp4" for i in range(40)]
    forward = splits(write_csv(tmp_path, *(f"{name},{name},," for name in names)), 0.3)
    backward = splits(write_csv(tmp_path, *(f"{name},{name},," for name in names[::-1])), 0.3)
    assert forward == backward and list(forward.values()).count("val") == 12


@pytest.mark.parametrize("link", ["symlink", "hard link", "folder link", "spelling"])
def test_a_video_under_another_name_stays_on_its_side(tmp_path: Path, link: str) -> None:
    """Whichever clip it is: one of the two is held out."""
    clips(tmp_path, "clips/a.mp4", "clips/b.mp4")
    for name in "ab":
        other = f"other/{name}.mp4"
        if link == "spelling":
            other = f"./clips//{name}.mp4"
        elif link == "folder link":
            if name == "a":
                (tmp_path / "other").symlink_to("clips")
        else:
            (tmp_path / "other").mkdir(exist_ok=True)
            make = os.link if link == "hard link" else os.symlink
            make(tmp_path / f"clips/{name}.mp4", tmp_path / other)
        rows = (f"clips/a.mp4,a,,\nclips/b.mp4,b,,\n{other},again,,",)
        dealt = splits(write_csv(tmp_path, *rows))
        assert dealt["again"] == dealt[name]
        assert sorted((dealt["a"], dealt["b"])) == ["train", "val"]


def test_a_group_stays_together_with_all_rows_of_its_videos(tmp_path: Path) -> None:
    rows = [f"{i}.mp4,{i},,{'shot one' if i % 2 else 'shot two'}" for i in range(10)]
    rows += ["./1.mp4,later,,"]
    dealt = splits(write_csv(tmp_path, *rows), 0.1)
    assert len({dealt[str(i)] for i in (1, 3, 5, 7, 9)} | {dealt["later"]}) == 1
    assert dealt["0"] != dealt["1"]


def test_rows_may_say_their_split(tmp_path: Path) -> None:
    rows = ["a.mp4,a,val,", "b.mp4,b,train,", "c.mp4,c,val,", "./c.mp4,d,val,"]
    dealt = splits(write_csv(tmp_path, *rows), 0.01)
    assert dealt == {"a": "val", "b": "train", "c": "val", "d": "val"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.mp4,a,test,", "b.mp4,b,train,"], "line 2: split must be train or val, not 'test'"),
        (["a.mp4,a,val,", "b.mp4,b,,"], "line 3: says no split, and metadata.csv line 2 does"),
        (["a.mp4,a,val,", "./a.mp4,b,train,"], "line 3: split is train, and val in .* same video"),
        (["a.mp4,a,val,x", "b.mp4,b,train,x"], "line 3: split is train, and val in .* same group"),
        (["a.mp4,a,,x", "./a.mp4,b,,y"], "line 3: ./a.mp4 is of group 'y', and the same video is"),
    ],
)
def test_rows_that_contradict_each_other_are_named(
    tmp_path: Path, rows: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        splits(write_csv(tmp_path, *rows))


def test_an_empty_side_is_told(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", torch.zeros(9, 32, 32, 3, dtype=torch.uint8), 8)
    write_csv(tmp_path, "a.mp4,a,train,")
    config = folder(tmp_path, metadata="metadata.csv")
    with pytest.raises(UserError, match=r"no clip left in the val split \(0 of 1 rows"):
        FolderDataset(config, "val")


def folder(root: Path, **changes: Any) -> FolderConfig:
    return FolderConfig(path=str(root), frames=9, size=(32, 32), fps=8, **changes)


def test_both_splits_of_a_data_set_are_disjoint_and_whole(tmp_path: Path) -> None:
    names = [f"{i}.mp4" for i in range(6)]
    for name in names:
        write_mp4(tmp_path / name, torch.zeros(9, 32, 32, 3, dtype=torch.uint8), 8)
    write_csv(tmp_path, *(f"{name},{name},," for name in names))
    config = folder(tmp_path, metadata="metadata.csv", val_fraction=0.34)
    captions = {
        split: {dataset[i].caption for i in range(len(dataset))}
        for split in ("train", "val")
        for dataset in [FolderDataset(config, cast(Any, split))]
    }
    assert len(captions["train"]) == 4 and len(captions["val"]) == 2
    assert captions["train"] | captions["val"] == set(names)


@pytest.mark.parametrize("how", ["train", "probe"])
def test_a_run_that_an_older_rule_dealt_is_refused(
    make_config: Any, tmp_path: Path, how: Literal["train", "probe"]
) -> None:
    config: RunConfig = make_config().model_copy(
        update={"data": folder(tmp_path), "output": str(tmp_path)}
    )
    run = RunFolder.create(config)
    assert RunFolder.create(config).path == run.path  # resumed
    lines = dump(config).split("\n")
    older = [line for line in lines if "split_rule" not in line and "follow_links" not in line]
    run.recipe.write_text("\n".join(older))
    with pytest.raises(UserError, match="another rule: choose another name, or use that version"):
        if how == "train":
            RunFolder.create(config)
        else:
            probe_run(run.path)
    assert run.recipe.read_text() == "\n".join(older)
