"""Where the models that recipes name are found."""

from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.models.model_files import local_folder, on_disk


def test_a_local_folder_wins_over_a_shipped_asset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = on_disk("assets/tiny-dino")
    assert shipped is not None and (shipped / "config.json").is_file()
    (tmp_path / "assets/tiny-dino").mkdir(parents=True)
    assert on_disk("assets/tiny-dino") == Path("assets/tiny-dino")
    assert on_disk(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["./nothing", "/nothing/here", "assets/nothing", "a/b/c"])
def test_what_can_only_be_a_folder_is_not_looked_up_on_the_hub(source: str) -> None:
    assert on_disk(source) is None
    with pytest.raises(UserError, match=r"model\.path: .*no such folder"):
        local_folder(source, setting="model.path", marker="config.json", patterns=[])


def test_a_folder_without_the_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        local_folder(str(tmp_path), setting="model.path", marker="model_index.json", patterns=[])
