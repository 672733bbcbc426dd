"""The rule of names: one for folders, variants and aliases, and the error says what breaks it."""

from pathlib import Path

import pytest

from alignlab.config.names import check_alias, check_name
from alignlab.errors import UserError
from alignlab.experiments.compare.config import load_compare
from alignlab.recipe import load_run


@pytest.mark.parametrize(
    "name", ["ra", "weight-0.1_blocks-0-1", "+1", ".hidden", "wörter", "猫", "a" * 200]
)
def test_names_that_are_kept(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "is empty"),
        ("..", "not of dots alone"),
        ("a b", r"holds ' ' \(U\+0020\) in place 2"),
        ("=1", r"holds '=' \(U\+003D\) in place 1"),
        ("a\x1b", r"U\+001B"),
        ("a\n", r"U\+000A\) in place 2"),
        ("\u202eb", r"U\+202E"),
        ("a\ud800", r"U\+D800"),
        ("猫" * 67, "takes 201 bytes"),
    ],
)
def test_names_that_are_refused(name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_name(name)


@pytest.mark.parametrize("alias", ["a.b", "a+b", "dino v2 (b)", "a" * 101])
def test_aliases_that_are_refused(alias: str) -> None:
    with pytest.raises(ValueError, match="an alias is made of letters, digits, - and _"):
        check_alias(alias)


def test_a_recipe_names_the_key_and_the_character(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^teachers: 'dino v2' holds ' ' \(U\+0020\) in place 5"):
        load_run(recipe_file, ["teachers={'dino v2': {family: dinov2, path: x}}", "objectives={}"])
    with pytest.raises(UserError, match=r"^name: 'a/b c' must be .*: 'b c' holds ' '"):
        load_run(recipe_file, ["name=a/b c"])
    path = tmp_path / "compare.yaml"
    path.write_text(recipe_file.read_text() + "seeds: [0]\nbaseline: x\nvariants: {'=1': {}}\n")
    with pytest.raises(
        UserError, match=r"^variants: '=1' holds '=' .* a variant's name is made of"
    ):
        load_compare(path)
