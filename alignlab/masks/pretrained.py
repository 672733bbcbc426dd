"""What the segmenters with a model share: its folder, its weights, and the pixels it reads.

The image transform is made here, by the numbers of the folder's processor config: the processors of
SAM 2 and SAM 3 videos need torchvision.
Shape letters: T frames, H height, W width, C channels.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.errors import UserError
from alignlab.masks.segmenter import Frame
from alignlab.models.model_files import load_pretrained, local_folder, read_object
from alignlab.models.weight_check import check_weights
from alignlab.runs.file_digests import folder_digest
from alignlab.teachers.preprocessing import Preprocessing, read_preprocessing
from alignlab.teachers.registry import BUILT_IN

FILES = ("json", "safetensors", "txt")
SETTING = "--model"


class PretrainedVideoModel:
    """A video model of transformers, loaded when it is first needed.

    On a GPU it is kept in bf16, on a CPU in fp32.

    Args:
        source: folder or hub id.
        model_type: that its config.json must say.
        model_class: name of the class in transformers.
        mean: of pixels, where the folder has no processor config.
        std: likewise.
        unread: regular expression of weights that nothing reads.

    Raises:
        UserError: no such folder, another model, or a broken processor config.
    """

    def __init__(
        self,
        source: str,
        model_type: str,
        model_class: str,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        unread: str = r"$^",
    ) -> None:
        patterns = [f"*.{ending}" for ending in FILES]
        self.folder = local_folder(source, setting=SETTING, marker="config.json", patterns=patterns)
        found = read_object(self.folder / "config.json", setting=SETTING).get("model_type")
        if found != model_type:
            raise UserError(
                f"{SETTING}: {self.folder} holds a {found} model, this backend loads {model_type}"
            )
        self._class, self._unread = model_class, unread
        self._preprocessing = _preprocessing(self.folder, mean, std)
        self._model: Any = None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def settings(self) -> dict[str, str | float | int]:
        """What the model's masks depend on."""
        import transformers

        return {
            "model": folder_digest(self.folder, FILES),
            "transformers": transformers.__version__,
            "dtype": str(self.dtype),
        }

    def loaded(self) -> Any:
        """The model, in evaluation mode.

        Raises:
            UserError: the weights are damaged, or not those of the class.
        """
        if self._model is not None:
            return self._model
        import transformers

        from alignlab.runs.log_filters import quiet_libraries

        model_class = getattr(transformers, self._class, None)
        if model_class is None:
            raise UserError(
                f"{SETTING}: transformers {transformers.__version__} has no {self._class}"
            )
        with quiet_libraries():
            model, info = load_pretrained(
                model_class,
                self.folder,
                setting=SETTING,
                dtype=self.dtype,
                use_safetensors=True,
                output_loading_info=True,
            )
        missing = sorted(key for key in info["missing_keys"] if not re.search(self._unread, key))
        if missing:
            raise UserError(
                f"{SETTING}: {self.folder} lacks {len(missing)} weights, e.g. {missing[0]}"
            )
        check_weights(f"{SETTING}: {self.folder}", model.named_parameters())
        self._model = model.requires_grad_(False).eval().to(self.device)
        return self._model

    def pixels(self, frames: Iterable[Frame], side: int) -> Tensor:
        """Frames as the model reads them, `(T, C, side, side)`: 4 bytes for each number on a CPU.

        Raises:
            UserError: the processor config asks for another size.
        """
        asked = self._preprocessing
        if asked.size not in (None, (side, side)):
            raise UserError(
                f"{SETTING}: {asked.source} asks for {asked.size}, the model reads {side}x{side}"
            )
        mean_C11, std_C11 = (torch.tensor(v)[:, None, None] for v in (asked.mean, asked.std))
        stack = []
        for frame_HWC in frames:
            image_1CHW = torch.from_numpy(frame_HWC).permute(2, 0, 1)[None].contiguous()
            resized_CHW = F.interpolate(image_1CHW, (side, side), mode="bilinear", antialias=True)[
                0
            ]
            scaled_CHW = (resized_CHW.float() / 255 * asked.scale - mean_C11) / std_C11
            stack.append(scaled_CHW.to(self.dtype))
        return torch.stack(stack)


def _preprocessing(
    folder: Path, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Preprocessing:
    row = dataclasses.replace(BUILT_IN["sam2"], video=True, mean=mean, std=std)
    try:
        read, warning = read_preprocessing(folder, row)
    except UserError as error:
        raise UserError(str(error).replace("teachers:", f"{SETTING}:", 1)) from error
    if warning is not None:
        raise UserError(f"{SETTING}: {warning}")
    return read
