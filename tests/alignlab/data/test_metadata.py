"""Metadata files that are nearly right: no row is lost or read as another without a word."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.config.data import FolderConfig
from alignlab.data.folder import FolderDataset
from alignlab.data.metadata import Row, read_rows
from alignlab.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for i in range(4):
        (tmp_path / f"clips/c{i}.mp4").touch()
    return tmp_path


def read_csv(root: Path, text: str) -> list[Row]:
    (root / "metadata.csv").write_text(text, "utf-8")
    return read_rows(root, "metadata.csv")


@pytest.mark.parametrize(
    ("captions", "line"),
    [
        (["clip 0", '"clip 1', "clip 2", "clip 3"], 3),
        (["clip 0", "clip 1", "clip 2", '"clip 3'], 5),
        (['"Go" she says', "clip 1", "clip 2", "clip 3"], 2),
        (['"first of two', "clip 1", '"second of two', "clip 3"], 2),
        (["clip 0", '"12 inch', '13"', "clip 3"], 3),
        (["clip 0", '"12" pizza', "clip 2", "clip 3"], 3),
        (['12" pizza, hot', "clip 1", "clip 2", "clip 3"], 2),
    ],
)
def test_an_open_quote_is_named_by_the_row_that_opens_it(
    root: Path, captions: list[str], line: int
) -> None:
    rows = [f"clips/c{i}.mp4,{caption}" for i, caption in enumerate(captions)]
    with pytest.raises(UserError, match=f"^metadata.csv line {line}: ") as error:
        read_csv(root, "\n".join(["file_name,caption", *rows, ""]))
    assert "\n" not in str(error.value)


def test_quotes_that_are_right_are_read(root: Path) -> None:
    rows = 'clips/c0.mp4,"a ""round"", red\nball"\r\n\r\nclips/c1.mp4,12" disc\r\n'
    text = f"file_name,caption\r\n{rows}"
    assert [row.caption for row in read_csv(root, text)] == ['a "round", red\nball', '12" disc']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,caption,caption\nclips/c0.mp4,a,b\n", "line 1: has the column 'caption' twice"),
        ("file_name,caption,start\nclips/c0.mp4,a\n", r"line 2: has fewer cells .*\(2, not 3\)"),
        ("file_name,caption\nclips/c0.mp4,a, b\n", r"line 2: has more cells .*\(3, not 2\)"),
        ("file_name,caption\nclips/c0.mp4,nan\n", "line 2: caption is 'nan', which is a missing"),
        ("file_name,caption\n\ufeffclips/c0.mp4,a\n", "line 2: file_name .* byte order mark"),
        ("file_name,caption\nclips/c0.mp4,a\0b\n", r"line 2: caption holds .* U\+0000 in place 2"),
    ],
)
def test_a_bad_csv_row_is_named(root: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_csv(root, text)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (r'{"file_name": "clips/c1.mp4", "caption": "a \ud83d cat"}', "U.D83D in place 3, .* half"),
        (r'{"file_name": "clips/\ud83d.mp4", "caption": "a"}', "file_name holds .* U.D83D"),
        (r'{"file_name": "clips/c1\u0000.mp4", "caption": "a"}', "file_name holds .* U.0000"),
        (r'{"file_name": "clips/c1\n.mp4", "caption": "a"}', "has a control character"),
        (r'{"file_name": "clips/c1.mp4", "caption": "a \u0000 cat"}', "caption holds .* U.0000"),
        (r'{"file_name": "clips/c1.mp4", "text": "a \u0007 cat"}', "text holds .* U.0007"),
        (r'{"file_name": "clips/c1.mp4", "caption": "\ufeffa cat"}', "byte order mark"),
        (r'{"file_name": "clips/c1.mp4", "caption": "a", "references": ["\ud83d"]}', "references"),
        (
            r'{"file_name": "clips/c1.mp4", "caption": "a", "references": ["r"],'
            r' "reference_phrases": ["\udc00"]}',
            "reference_phrases holds",
        ),
        (r'{"file_name": "clips/c1.mp4", "caption": "a", "group": "\udc00"}', "group holds"),
        ('{"file_name": "clips/c1.mp4", "caption": "a", "caption": "b"}', "has 'caption' twice"),
        ('{"file_name": "clips/c1.mp4", "caption": NaN}', "caption must be a text, not nan"),
        ('{"file_name": "clips/c1.mp4", "caption": ["a"]}', r"caption must be a text, not \['a'\]"),
        ('{"file_name": "clips/c1.mp4", "caption": "None"}', "caption is 'None', which is"),
        ('{"file_name": "clips/c1.mp4", "caption": "a", "start": NaN}', "start must be a number"),
        ('{"file_name": "clips/c1.mp4", "caption": "a", "group": 7}', "group must be a text"),
        ('\ufeff{"file_name": "clips/c1.mp4", "caption": "a"}', "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_bad_json_row_is_named(root: Path, row: str, message: str, kind: str) -> None:
    first = json.dumps({"file_name": "clips/c0.mp4", "caption": "a"})
    whole = f"{first}\n{row}" if kind == "jsonl" else f"[{first}, {row}]"
    (root / f"metadata.{kind}").write_text(whole, "utf-8")
    where = "line 2: " if kind == "jsonl" else "entry 2: "
    where = "" if "not valid JSON" in message and kind == "json" else where
    with pytest.raises(UserError, match=f"{where}.*{message}") as error:
        read_rows(root, f"metadata.{kind}")
    str(error.value).encode()  # can be printed


def test_what_captions_may_hold(root: Path) -> None:
    caption = "a \U0001fae8 face, 🙂\tand\n“ünï”"
    line = json.dumps({"file_name": "clips/c0.mp4", "caption": caption, "other": {"a": "\ud83d"}})
    (root / "metadata.jsonl").write_text(line)
    assert [row.caption for row in read_rows(root, "metadata.jsonl")] == [caption]


def test_links_out_of_the_folder_are_followed_when_asked(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "x.mp4").touch()
    (root / "linked").symlink_to(outside)
    (root / "metadata.jsonl").write_text('{"file_name": "linked/x.mp4", "caption": "a"}')
    settings: dict[str, Any] = {"frames": 5, "size": (32, 32), "on_bad_video": "skip"}
    with pytest.raises(UserError, match=r"is a link out of .*; data\.follow_links=true allows"):
        FolderDataset(FolderConfig(path=str(root), **settings), "val")
    with pytest.raises(UserError, match=r"no clip left in the val split \(1 of 1"):  # it is empty
        FolderDataset(FolderConfig(path=str(root), follow_links=True, **settings), "val")
    (root / "metadata.jsonl").write_text('{"file_name": "../x.mp4", "caption": "a"}')
    with pytest.raises(UserError, match="must be a path inside"):
        read_rows(root, "metadata.jsonl", follow_links=True)
