"""`alignlab assets build`: from nothing to loadable folders, with two steps per stage."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alignlab.errors import UserError
from alignlab.models.wan import load_wan
from alignlab.teachers import load_teacher
from alignlab.tiny_models import build as stages
from alignlab.tiny_models.build import build, checksums

SMALL = {
    "CLIPS": 24,
    "VAE_CLIPS": 8,
    "WAN_CLIPS": 20,
    "VAE_STEPS": 2,
    "VAE_DECODER_STEPS": 2,
    "DINO_STEPS": 2,
    "WAN_STEPS": 2,
}


def test_a_model_that_is_not_there_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--keep vae: .*tiny-wan/vae holds no model"):
        build(tmp_path, work=tmp_path / "work", keep=["vae"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns inside itself
def test_build_writes_what_the_loaders_read_and_can_keep_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(stages, name, value)
    monkeypatch.setattr(stages, "measure", lambda folder: {"measured": 1.0})  # minutes long
    out = build(tmp_path / "assets", work=tmp_path / "first")
    assert checksums(out) == json.loads((out / "checksums.json").read_text())
    assert json.loads((out / "quality.json").read_text()) == {"measured": 1.0}
    assert load_wan(str(out / "tiny-wan")).num_blocks == 8
    assert load_teacher("tiny-dino", path=str(out / "tiny-dino")).dim == 96

    weights = "tiny-wan/vae/diffusion_pytorch_model.safetensors"
    kept = load_file(out / weights)
    before = checksums(out)
    monkeypatch.setattr(stages, "WAN_STEPS", 3)
    build(out, work=tmp_path / "second", keep=["vae", "dino"])
    after = checksums(out)
    changed = {file for file in before if before[file] != after[file]}
    assert {file.split("/")[1] for file in changed} == {"transformer", "text_encoder"}
    assert all(value.equal(kept[name]) for name, value in load_file(out / weights).items())
