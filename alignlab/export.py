"""What inference needs of a run, and nothing else: no projector, no alignlab."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.lora_formats import LoraFormat, write_lora
from alignlab.model_card import FILE, model_card
from alignlab.models.other_expert import folder_with_other
from alignlab.progress import tell
from alignlab.runs.atomic_files import whole_folder, write_text
from alignlab.runs.checkpoint_folders import step_of
from alignlab.runs.out_paths import out_folder
from alignlab.runs.run_folder import RunFolder
from alignlab.sampling import load_trained
from alignlab.training.checkpoint import NEWEST, ModelChoice

log = logging.getLogger(__name__)

ZEROS = (
    "this model was trained with frames of zeros in place of absent references "
    "(model.absent_references: zero): inference has to append them (losses/README.md, refalign); "
    "a plain WanPipeline does not"
)
RANDOM = "this model was trained from random weights (model.init: random), not from {path}"


def export(
    run_dir: Path,
    out: Path | None = None,
    choice: ModelChoice = NEWEST,
    kind: LoraFormat = "diffusers",
) -> Path:
    """Writes a trained model of a run.

    Full fine-tuning gives a diffusers pipeline folder, `WanPipeline.from_pretrained(out)`. LoRA
    gives the adapter, `pipeline.load_lora_weights(out)`, or that of another program
    (`alignlab.lora_formats`). Of a run with
    `model.absent_references: zero` a warning says what inference has to add; of one with
    `model.init: random` a line says that nothing of `model.path`'s transformer is in it. Beside
    either is `model_card.md` (`alignlab.model_card`). Of a pipeline with two transformers the
    trained one is written and the other copied; an adapter is of the trained one.

    Args:
        run_dir: its folder.
        out: the folder to write; None: the run's own `export` (`export-comfyui` and so on), which
            may be written again.
        choice: which model of the run.
        kind: whose keys a LoRA has.

    Raises:
        UserError: no such run or checkpoint, or `out` holds something else or cannot
            be written; or `kind` is another than `diffusers` and the run trained all weights.
    """
    own = run_dir / ("export" if kind == "diffusers" else f"export-{kind}")
    is_default, out = out is None, out or own
    if kind != "diffusers" and RunFolder.open(run_dir).config().model.train != "lora":
        raise UserError(
            f"--format {kind} is for a LoRA, and this run trained all weights: leave it out for a "
            "diffusers pipeline folder"
        )
    with out_folder(out, is_default=is_default):
        if out.exists() and out != own and any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another --out, or remove it")
        _write(run_dir, out, choice, kind)
    return out


def _write(run_dir: Path, out: Path, choice: ModelChoice, kind: LoraFormat) -> None:
    wan = load_trained(run_dir, choice)
    config = RunFolder.open(run_dir).config()
    if config.model.absent_references == "zero":
        log.warning(ZEROS)
    if config.model.init == "random":
        tell(RANDOM.format(path=config.model.path))
    card = model_card(RunFolder.open(run_dir), which=_shown(run_dir, choice, config), kind=kind)
    with whole_folder(out) as folder:
        if getattr(wan.transformer, "peft_config", None):
            write_lora(wan.transformer, folder, kind, stem=config.name.replace("/", "-"))
            write_text(folder / FILE, card)
            return
        if config.model.expert is not None:  # on the hub it may not have been fetched yet
            folder_with_other(config.model)
        ignored = _base_weights(wan.folder, wan.part)
        shutil.copytree(wan.folder, folder, dirs_exist_ok=True, ignore=ignored)
        wan.transformer.save_pretrained(folder / wan.part)
        index = json.loads((folder / "model_index.json").read_text())
        index["_name_or_path"] = config.name
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        write_text(folder / FILE, card)


def _shown(run_dir: Path, choice: ModelChoice, config: RunConfig) -> str:
    """Which model is exported, in words."""
    step = step_of(choice.find(RunFolder(run_dir).checkpoints))
    is_average = choice.is_average(config.optim)
    return f"the moving average of the weights at step {step}" if is_average else f"step {step}"


def _base_weights(pipeline: Path, part: str) -> Callable[[str, list[str]], set[str]]:
    """For copytree: leaves out the transformer that the run started from."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        return {part} & set(names) if Path(folder) == pipeline else set()

    return ignored
