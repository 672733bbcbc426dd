"""The model card of a trained model: what it was made from, how, and what was measured."""

import html
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from alignlab.config.run import RunConfig
from alignlab.environment import read_environment
from alignlab.errors import one_line, printable
from alignlab.lora_formats import LoraFormat
from alignlab.losses import OBJECTIVES
from alignlab.losses.weight import weight_in_words
from alignlab.models.experts import transformer_part
from alignlab.passwords import without_password
from alignlab.recipe import recipe_hash
from alignlab.runs.input_record import InputRecord
from alignlab.runs.run_folder import RunFolder

FILE = "model_card.md"
FULL = 'from diffusers import WanPipeline\n\npipeline = WanPipeline.from_pretrained("FOLDER")'
LORA: dict[LoraFormat, str] = {
    "diffusers": """from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained({base})
pipeline.load_lora_weights({lora})""",
    "peft": """from diffusers import WanTransformer3DModel
from peft import PeftModel

base = WanTransformer3DModel.from_pretrained({base}, subfolder="{part}")
transformer = PeftModel.from_pretrained(base, "FOLDER")""",
}
COPIED: dict[LoraFormat, str] = {
    "comfyui": "The .safetensors file goes into ComfyUI's models/loras; it is for {base}.",
    "musubi": "The .safetensors file is for musubi-tuner (--lora_weight) and ComfyUI, with {base}.",
}


def model_card(folder: RunFolder, *, which: str = "", kind: LoraFormat = "diffusers") -> str:
    """The card as Markdown, with the metadata that Hugging Face reads at its top.

    Args:
        folder: of a run; what it does not have yet, such as its result, is left out.
        which: which of its models it is, in words; empty: the one that the result is of.
        kind: whose keys its weights have, if it is a LoRA.

    Raises:
        UserError: a file of the folder is damaged.
    """
    config = folder.config()
    result = folder.read_result() or {}
    metrics: Mapping[str, float] = result.get("metrics", {})
    lines = [*_metadata(config), f"# {_text(config.name)}", "", _summary(config), ""]
    if which:
        lines += [f"This is {_text(which)}. The metrics are those of the run's end.", ""]
    lines += ["## Training", "", *_table(_facts(folder, config)), ""]
    if config.objectives:
        objectives = _objectives(config, result.get("weights", {}))
        lines += ["## Alignment objectives", "", *_table(objectives), ""]
    lines += ["## Read", "", *_table(_inputs(folder, config)), ""]
    if metrics:
        values = ((name, f"{value:.6g}") for name, value in metrics.items())
        lines += ["## Measured", "", *_table([("metric", "value"), *values]), ""]
    if notes := result.get("notes"):
        lines += ["## Warnings", "", *(f"- {_text(str(note))}" for note in notes), ""]
    lines += ["## Use", "", *_use(config, kind)]
    return "\n".join(lines) + "\n"


def _metadata(config: RunConfig) -> list[str]:
    tags = ["text-to-video", "alignlab"]
    tags += sorted({str(objective.name) for objective in config.objectives.values()})
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-video"]
    if config.model.init != "random":
        lines.append(f"base_model: {json.dumps(config.model.path)}")  # JSON texts are YAML ones
    return [*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""]


def _summary(config: RunConfig) -> str:
    model = config.model
    start = "from random weights" if model.init == "random" else f"from {_text(model.path)}"
    how = "all weights" if model.lora is None else f"a LoRA of rank {model.lora.rank}"
    loss = "flow matching alone"
    if config.objectives:
        names = ", ".join(sorted({str(o.name) for o in config.objectives.values()}))
        loss = f"flow matching and {_text(names)}"
    return f"A Wan video diffusion transformer: {how} trained {start} with {loss}."


def _facts(folder: RunFolder, config: RunConfig) -> Iterable[tuple[str, str]]:
    yield "setting", "value"
    if config.model.expert is not None:
        yield "expert", f"{config.model.expert} noise ({transformer_part(config.model.expert)})"
    if config.model.reference_timestep == "zero":
        yield "timestep of references", "0"
    yield "optimizer steps", str(config.steps)
    yield "samples in a step", str(config.optim.batch_size * config.optim.accumulate)
    yield "learning rate", f"{config.optim.lr:g}"
    yield "seed", str(config.seed)
    yield "data", config.data.name
    yield "recipe hash", recipe_hash(config)
    path = folder.path / "environment.json"
    facts = read_environment(path) if path.exists() else {}
    for name in ("alignlab", "commit", "device", "torch", "diffusers"):
        if name in facts:
            yield name, facts[name]


def _objectives(
    config: RunConfig, weights: Mapping[str, Mapping[str, float]]
) -> Iterable[tuple[str, ...]]:
    """A row for each; `weights` is what a result says of those that were measured."""
    yield "name", "objective", "paper", "weight", "blocks", "teachers"
    for alias, objective in config.objectives.items():
        paper = getattr(OBJECTIVES[objective.name], "paper", None)
        blocks = " to ".join(", ".join(map(str, named)) for named in objective.taps.values())
        teachers = (f"{name} ({config.teachers[name].family})" for name in objective.teachers)
        shown = f"arXiv:{paper}" if paper else ""
        weight = weight_in_words(objective.weight)
        if alias in weights:
            weight += f": {weights[alias]['weight']:.3g}"
        yield alias, str(objective.name), shown, weight, blocks, ", ".join(teachers)


def _inputs(folder: RunFolder, config: RunConfig) -> Iterable[tuple[str, ...]]:
    yield "input", "source", "files", "SHA-256 of all"
    for one in InputRecord(folder.path, config.output).inputs.values():
        yield one.name, one.source, str(one.num_files), one.digest


def _use(config: RunConfig, kind: LoraFormat) -> list[str]:
    path = without_password(config.model.path)
    expert, part = config.model.expert, transformer_part(config.model.expert)
    # diffusers puts an adapter on the high-noise expert unless told otherwise
    lora = '"FOLDER"' + (", load_into_transformer_2=True" if expert == "low" else "")
    if kind in COPIED:
        of_expert = "" if expert is None else f" (its {expert}-noise expert)"
        lines = [COPIED[kind].format(base=_text(path) + of_expert)]
    else:
        code = FULL
        if config.model.train == "lora":
            code = LORA[kind].format(base=json.dumps(path), part=part, lora=lora)
        lines = ["FOLDER is what `alignlab export` wrote.", "", "```python"]
        lines += [printable_code(code), "```"]
    if config.model.absent_references == "zero":
        lines += ["", "It was trained with frames of zeros in place of absent references: append"]
        lines += ["them at inference."]
    if config.model.reference_timestep == "zero":
        lines += ["", "References have timestep 0, each of their tokens: give timesteps by token."]
    return lines


def printable_code(code: str) -> str:
    """Code whose texts cannot end its block."""
    return code.replace("```", "` ` `")


def _table(rows: Iterable[tuple[Any, ...]]) -> list[str]:
    """A Markdown table; the first row is its head."""
    head, *body = [[_text(str(cell)) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(line)} |" for line in lines]


def _text(text: str) -> str:
    """Text that Markdown shows as it is, in one line, without passwords in URLs."""
    line = html.escape(printable(one_line(without_password(text))), quote=False)
    return re.sub(r"([\\|*_`\[\]~$])", r"\\\1", line)
