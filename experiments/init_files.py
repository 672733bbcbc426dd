"""`alignlab init`: files to begin with, which are written once and never over others.

The texts are in `templates/`; NAME, FILE and FOLDER in them are replaced.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from alignlab.config.names import check_name
from alignlab.errors import UserError
from alignlab.runs.atomic_files import named_errors, whole_folder

TEMPLATES = Path(__file__).parent / "templates"
FRAMES, FPS, SIZE = 81, 16.0, (128, 128)  # long enough for the settings of `folder` as they are
EXAMPLES = ("train", "train", "train", "val")  # the split of each


def write_recipe(kind: Literal["compare", "sweep"], target: Path) -> Path:
    """Writes a commented recipe that trains as it stands.

    Args:
        kind: which command it is for.
        target: the file, or its name without `.yaml`; its folder is made. The recipe has the
            file's name.

    Returns:
        The file.

    Raises:
        UserError: something is there, or the name is none that runs may have or that of a shipped
            recipe.
    """
    from alignlab.config.recipe_file import shipped_recipes

    path = target if target.suffix in (".yaml", ".yml") else target.with_name(f"{target.name}.yaml")
    name = _checked(path.stem)
    if name in shipped_recipes():
        raise UserError(f"{name}: a shipped recipe has that name: choose another one")
    text = (TEMPLATES / f"{kind}.yaml").read_text("utf-8")
    _write_new(path, _filled(text, {"NAME": name, "FILE": shlex.quote(str(path))}))
    return path


def write_data(folder: Path) -> Path:
    """Writes a data set of four generated clips with references, `metadata.jsonl` and a README.

    Args:
        folder: to make; an empty one is taken.

    Returns:
        `folder`, which `data.name=folder data.path=FOLDER` trains on.

    Raises:
        UserError: something is in it, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and nothing in it is replaced: name a new folder")
    text = (TEMPLATES / "data_readme.md").read_text("utf-8")
    filled = _filled(text, {"NAME": folder.resolve().name, "FOLDER": shlex.quote(str(folder))})
    with whole_folder(folder) as partial:
        rows = _write_examples(partial)
        (partial / "README.md").write_text(filled, "utf-8")
        lines = (json.dumps(row) + "\n" for row in rows)
        (partial / "metadata.jsonl").write_text("".join(lines), "utf-8")
    return folder


def _write_examples(folder: Path) -> list[dict[str, object]]:
    """Clips as `shapes` draws them, and their rows."""
    import torch
    from PIL import Image

    from alignlab.config.data import ShapesConfig
    from alignlab.data.shapes.dataset import ShapesDataset
    from alignlab.data.video import write_mp4

    rows: list[dict[str, object]] = []
    clips = ShapesDataset(ShapesConfig(frames=FRAMES, size=SIZE, references=(2, 3)), "train")
    for index, split in enumerate(EXAMPLES):
        sample = clips[index]
        write_mp4(folder / f"clips/{index}.mp4", sample.video_THWC, FPS)
        names = [f"references/{index}-{k}.png" for k in range(len(sample.references))]
        (folder / "references").mkdir(exist_ok=True)
        for name, reference in zip(names, sample.references, strict=True):
            alpha_HW1 = (reference.mask_HW.to(torch.uint8) * 255)[..., None]
            cut_HWC = torch.cat([reference.image_HWC, alpha_HW1], dim=2)
            Image.fromarray(cut_HWC.numpy(), "RGBA").save(folder / name)
        row: dict[str, object] = {"file_name": f"clips/{index}.mp4", "caption": sample.caption}
        row |= {"references": names, "reference_names": [r.name for r in sample.references]}
        row |= {"reference_phrases": [r.phrase for r in sample.references], "split": split}
        rows.append(row)
    return rows


def _checked(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise UserError(error) from None


def _filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\b(NAME|FILE|FOLDER)\b", lambda match: values.get(match[1], match[1]), text)


def _write_new(path: Path, text: str) -> None:
    """Writes a file that is not there yet."""
    try:  # "x" fails where something is, also where it came in between
        path.parent.mkdir(parents=True, exist_ok=True)
        with named_errors(path), path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        if not path.exists():  # a folder above it is a file
            raise UserError(f"{error.filename} is a file: choose another folder") from None
        raise UserError(f"{path} is there already, and is not replaced: choose another") from None
    except NotADirectoryError as error:
        raise UserError(f"{error.filename}: a part of it is a file: choose another") from None
