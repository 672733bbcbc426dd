"""The model card of an export: what the model is, from what it was made, and no more than text."""

import json
import shutil
from pathlib import Path

import yaml

from alignlab.export import export
from alignlab.model_card import model_card
from alignlab.recipe import recipe_hash
from alignlab.runs.checksums import KEY
from alignlab.runs.run_folder import RunFolder
from alignlab.training.checkpoint import ModelChoice


def test_an_export_has_a_card_of_its_model(lora_run: Path, tmp_path: Path) -> None:
    card = (export(lora_run, tmp_path / "out", ModelChoice(step=2)) / "model_card.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    config = RunFolder(lora_run).config()
    assert yaml.safe_load(metadata) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "base_model": config.model.path,
        "tags": ["text-to-video", "alignlab", "refalign"],
    }
    assert "This is step 2." in text and "a LoRA of rank 4 trained from" in text
    assert f"| recipe hash | {recipe_hash(config)} |" in text
    assert "| ra | refalign | arXiv:" in text and "| 0, 2 | dino (dinov2) |" in text
    record = json.loads((lora_run / "inputs.json").read_text())
    assert all(one["digest"] in text for one in record["inputs"])
    result = json.loads((lora_run / "result.json").read_text())
    assert f"| val/flow | {result['metrics']['val/flow']:.6g} |" in text
    assert f"from_pretrained({json.dumps(config.model.path)})" in text


def test_what_others_wrote_is_text_in_a_card(full_run: Path, tmp_path: Path) -> None:
    folder = RunFolder(Path(shutil.copytree(full_run, tmp_path / "run")))
    content = json.loads(folder.result.read_text())
    notes = ["<script>x</script>", "a|b\n# head", "at https://me:secret@host/x"]
    folder.write_result(
        {key: value for key, value in content.items() if key != KEY} | {"notes": notes}
    )
    text = model_card(folder)
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "- a\\|b # head" in text
    assert "secret" not in text


def test_a_run_that_is_not_finished_has_a_card_without_metrics(
    full_run: Path, tmp_path: Path
) -> None:
    folder = RunFolder(Path(shutil.copytree(full_run, tmp_path / "run")))
    folder.result.unlink()
    text = model_card(folder)
    assert "## Measured" not in text and "## Training" in text
