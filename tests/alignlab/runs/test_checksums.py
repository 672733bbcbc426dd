"""Checksums: what was damaged is named, what is older than they are is read."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.runs.checksums import (
    DamagedError,
    damaged_files,
    read_checksums,
    read_json,
    with_checksum_line,
    without_checksum_line,
    write_checksums,
    write_json,
)
from damage import KINDS, cut, delete, empty, flip, folder

CONTENT = {"steps": 3, "metrics": {"a/b": 0.1, "none": math.inf}, "notes": ["é", "\ud83d"]}


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, CONTENT)
    assert read_json(path, fix="") == CONTENT
    path.write_text(json.dumps(json.loads(path.read_text())))  # other white space
    assert read_json(path, fix="") == CONTENT
    path.write_text(json.dumps({"steps": 3}))  # of an older version
    assert read_json(path, fix="") == {"steps": 3}


@pytest.mark.parametrize("damage", [k for k in KINDS if k is not delete], ids=lambda k: k.__name__)
def test_damaged_json_is_named_with_the_fix(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"metrics": {"val/flow": 0.123456789012345}})
    damage(path)
    with pytest.raises(DamagedError, match=r"result\.json is damaged \(.+\): remove it$") as caught:
        read_json(path, fix="remove it")
    assert "\n" not in str(caught.value)


def test_every_changed_digit_of_a_json_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"metrics": {"val/flow": 0.125}, "steps": 12})
    text = path.read_text()
    for place, letter in enumerate(text):
        if letter.isdigit():
            path.write_text(f"{text[:place]}{(int(letter) + 1) % 10}{text[place + 1 :]}")
            with pytest.raises(DamagedError):
                read_json(path, fix="")


def test_a_recipe_says_when_it_was_cut_or_edited() -> None:
    text = "steps: 3\nname: é\n"
    written = with_checksum_line(text)
    assert without_checksum_line(written) == without_checksum_line(text) == text
    for changed in (written.replace("3", "4"), written[:-3], written + "x: 1\n"):
        with pytest.raises(ValueError, match="checksum"):
            without_checksum_line(changed)


def test_a_folder_names_its_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ["empty", "cut", "flip", "gone", "sub/folder", "whole"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 9)
    write_checksums(tmp_path)
    expected = read_checksums(tmp_path)
    assert expected is not None and sorted(expected) == sorted(names)
    assert damaged_files(tmp_path, expected) == {}
    for damage, name in zip((empty, cut, flip, delete, folder), names, strict=False):
        damage(tmp_path / name)
    assert damaged_files(tmp_path, expected) == {
        "empty": "it is empty",
        "cut": "its checksum is another",
        "flip": "its checksum is another",
        "gone": "it is missing",
        "sub/folder": "it is a folder",
    }
    assert read_checksums(tmp_path / "sub") is None
    flip(tmp_path / "checksums.json")
    with pytest.raises(DamagedError, match=r"checksums\.json is damaged"):
        read_checksums(tmp_path)
