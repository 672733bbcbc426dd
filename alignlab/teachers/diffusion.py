"""Diffusion teachers: a trained video diffusion transformer whose hidden features are aligned to.

A second kind of teacher. `Teacher` is given frames or images; this one is given latents at its
noise level and the embedding of a text, as the transformer of a run is. It cannot read reference
images, and nothing is measured against it.
Shape letters: B batch, C channels, T, H, W of latents, L text tokens, N video tokens, P tokens per
frame, D width.
"""

import inspect
import json
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignlab.dataset_cache.clip_keys import ENVIRONMENT
from alignlab.dataset_cache.key import Part, digest_of
from alignlab.dataset_cache.model_parts import model_parts
from alignlab.errors import UserError
from alignlab.kernels.host_copy import to_device
from alignlab.losses.objective import Features
from alignlab.models.late_model import LateModel
from alignlab.models.model_files import check_model_files, local_folder, read_object
from alignlab.models.pipeline_parts import COMPONENTS, PART_FILES, load_frozen, part_endings
from alignlab.runs.file_digests import check_unchanged, folder_digest
from alignlab.teachers.registry import parse_feature, teacher_rows

if TYPE_CHECKING:  # diffusers takes seconds to import, and a recipe is read without it
    from alignlab.config.data import ClipsConfig
    from alignlab.config.parts import TeacherConfig
    from alignlab.models.frozen_parts import FrozenParts

NOISE_SEED = 0
"""Of the noise in a clip's latents, which is the clip's own: the same in every step and run."""

ENCODERS = ("vae", "text_encoder", "tokenizer")
"""Parts of a pipeline that the teacher must share with the student, whose values it reads."""


def diffusion_folder(family: str, path: str) -> Path:
    """The pipeline folder of a diffusion teacher, which is fetched if it is on the hub only.

    Raises:
        UserError: the folder or the hub id cannot be used.
    """
    from alignlab.models.experts import has_two_transformers, pipeline_index

    setting = f"teachers ({family}) path"
    if has_two_transformers(pipeline_index(path, setting=setting)):
        raise UserError(f"{setting}: {path} holds two transformers (Wan 2.2 experts); name one")
    patterns = ["model_index.json", "tokenizer/*"]
    patterns += [f"{part}/*.{e}" for part in ("transformer", *ENCODERS[:2]) for e in PART_FILES]
    folder = local_folder(path, setting=setting, marker="model_index.json", patterns=patterns)
    for part in ("transformer", *ENCODERS):
        if not (folder / part).is_dir():
            raise UserError(f"{setting}: {folder} has no {part}/ folder")
        check_model_files(folder / part, setting=setting)
    return folder


class DiffusionTeacher:
    """The transformer of a diffusers Wan folder up to one block, frozen.

    Args:
        config: a teacher of a family that reads latents.
        alias: the recipe's name of it, for messages.
        encoders: the student's, whose latents and embeddings it is given.
        clip: frames and size of the clips.
        device: where it runs: bf16 on a GPU, fp32 on a CPU.
        load: now; else when it is first needed.
        is_parked: one that is loaded later is on the device only while it makes features.

    Attributes:
        grid: (H, W) of its tokens: the transformer's own.
        num_frames: latent frames of its tokens.
        dim: width of its features.
        is_video: it sees whole clips; unlike a video encoder it has features of the first frame.

    Raises:
        UserError: the folder cannot be used, it was trained with another autoencoder or text
            encoder than the student, or its transformer has no such block or no place for such
            clips.
    """

    is_video = True

    def __init__(
        self,
        config: "TeacherConfig",
        *,
        alias: str,
        encoders: "FrozenParts",
        clip: "ClipsConfig",
        device: torch.device | str,
        load: bool = True,
        is_parked: bool = True,
    ) -> None:
        row = teacher_rows()[config.family]
        assert config.noise_level is not None  # the family's defaults, if left out
        assert config.caption is not None and config.centred is not None
        self.noise_level, self.reads_caption = config.noise_level, config.caption
        self.is_centred = config.centred
        self.feature = config.feature or row.feature
        self.name = f"teachers.{alias}"
        self._encoders = encoders
        self._device = torch.device(device)
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        self._folder = diffusion_folder(config.family, config.path or row.path)
        _check_same_encoders(self.name, self._folder, encoders.folder)
        settings = _transformer_settings(self.name, self._folder, encoders)
        self._block = _block(self.name, config.family, self.feature, int(settings["num_layers"]))
        self.dim = int(settings["num_attention_heads"]) * int(settings["attention_head_dim"])
        _, self._patch_height, self._patch_width = settings["patch_size"]
        grid = encoders.token_grid(settings["patch_size"], clip.frames, *clip.size)
        if max(grid) > settings["rope_max_seq_len"]:
            raise UserError(
                f"{self.name}: clips of {clip.frames} frames of {clip.size[0]}x{clip.size[1]} make "
                f"{max(grid)} positions, the transformer of {self._folder} has "
                f"{settings['rope_max_seq_len']}; take a smaller data.size or another teacher"
            )
        self.num_frames, self.grid = grid[0], grid[1:]
        self._late_model: LateModel[Any] = LateModel(
            partial(self._loaded, next(iter(row.classes.values()))),
            self._device,
            is_parked=is_parked and not load,
        )
        if load:
            self.load()

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents that it is given."""
        height, width = self.grid[0] * self._patch_height, self.grid[1] * self._patch_width
        return int(self._encoders.vae_config["z_dim"]), self.num_frames, height, width

    @property
    def text_dim(self) -> int:
        """Width of the embeddings that it is given."""
        return self._encoders.text.dim

    def load(self) -> None:
        """Loads the transformer, if it is not loaded yet.

        Raises:
            UserError: its files cannot be used, or have changed since `parts` named them.
        """
        self._late_model.loaded()

    def digest(self) -> str:
        """Names the transformer's files."""
        return str(self.parts["weights"])

    @cached_property
    def parts(self) -> dict[str, Part]:
        """What its features depend on besides the clip and its caption, for keys of the dataset
        cache. Whether they are centred is not among them: entries are as the transformer gave them.
        """
        return {
            "weights": folder_digest(self._folder / "transformer", PART_FILES),
            "feature": self.feature,
            "noise_level": self.noise_level,
            "noise_seed": NOISE_SEED,
            "reads_caption": self.reads_caption,
            **_encoder_parts(self._encoders),
            **model_parts(self._dtype, self._device, "diffusers"),
        }

    @cached_property
    def identity(self) -> str:
        """Short for `parts`, and whether its features are centred."""
        return digest_of("teacher", {**self.parts, "centred": self.is_centred})

    @torch.no_grad()
    def encode(self, noisy_BCTHW: Tensor, text_BLD: Tensor) -> Features:
        """Output of its block, fp32, on its own token grid; not centred.

        Args:
            noisy_BCTHW: the student's normalised latents, mixed with noise to `noise_level`.
            text_BLD: embeddings of captions or of the empty prompt.
        """
        if noisy_BCTHW.shape[1:] != self.latent_shape:
            raise ValueError(f"expected latents {self.latent_shape}, got {noisy_BCTHW.shape[1:]}")
        found: list[Tensor] = []
        device, dtype, time = self._device, self._dtype, self.noise_level * 1000
        with self._late_model.in_use() as model, torch.autocast(device.type, enabled=False):
            hook = model.blocks[-1].register_forward_hook(lambda _, __, out: found.append(out))
            try:
                model(
                    hidden_states=to_device(noisy_BCTHW, device).to(dtype),
                    timestep=torch.full((len(noisy_BCTHW),), time, device=device),
                    encoder_hidden_states=to_device(text_BLD, device).to(dtype),
                    return_dict=False,
                )
            finally:
                hook.remove()
        (tokens_BND,) = found
        tokens_BTPD = tokens_BND.float().unflatten(1, (self.num_frames, -1))
        return Features(tokens_BTPD, (self.num_frames, *self.grid))

    def _loaded(self, class_name: str) -> Any:
        import diffusers
        from diffusers.models.attention_dispatch import AttentionBackendName

        model = load_frozen(
            getattr(diffusers, class_name),
            self._folder,
            "transformer",
            setting=self.name,
            torch_dtype=self._dtype,
        )
        if "parts" in vars(self):
            check_unchanged(self._folder / "transformer", PART_FILES, self.parts["weights"])
        model.blocks = model.blocks[: self._block + 1]  # those after it take memory and time
        for block in model.blocks:
            # Else diffusers takes the backend that was last set in this process, the student's:
            # other numbers for the same key. Its own setter would set the student's in turn.
            for attention in (block.attn1, block.attn2):
                attention.processor._attention_backend = AttentionBackendName.NATIVE
        return model


def _block(name: str, family: str, feature: str, num_blocks: int) -> int:
    try:
        _, number = parse_feature(family, feature)
    except ValueError as error:
        raise UserError(f"{name}.feature: {error}") from None
    if number >= num_blocks:
        raise UserError(f"{name}.feature: no {feature}; the model has 0 to {num_blocks - 1}")
    return number


def _transformer_settings(name: str, folder: Path, encoders: "FrozenParts") -> dict[str, Any]:
    """Of its config.json, with diffusers' defaults.

    Raises:
        UserError: it is no text-to-video transformer for the student's latents and texts.
    """
    from diffusers import WanTransformer3DModel

    parameters = inspect.signature(WanTransformer3DModel.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    path = folder / "transformer" / "config.json"
    settings = defaults | read_object(path, setting=name)
    counts = ("num_layers", "num_attention_heads", "attention_head_dim", "rope_max_seq_len")
    patch = settings["patch_size"] if isinstance(settings["patch_size"], list | tuple) else ()
    numbers = [*(settings[key] for key in counts), *patch]
    if len(patch) != 3 or any(type(number) is not int or number < 1 for number in numbers):
        raise UserError(f"{name}: {path}: {', '.join(counts)} or patch_size are no whole numbers")
    expected = {
        "in_channels": encoders.vae_config["z_dim"],
        "text_dim": encoders.text.dim,
        "image_dim": None,
    }
    for key, value in expected.items():
        if settings[key] != value:
            raise UserError(
                f"{name}: {folder} is no text-to-video model for the student's latents and texts: "
                f"its transformer has {key} {settings[key]}, not {value}"
            )
    if patch[0] != 1:
        raise UserError(f"{name}: {folder}: the transformer's patches span several frames")
    return settings


def _check_same_encoders(name: str, folder: Path, student: Path) -> None:
    """Refuses another autoencoder or text encoder than the student's.

    Compared are weights and settings; of the latter not those that begin with `_`, such as the
    version of the library that wrote them.
    """
    if folder.resolve() == student.resolve():
        return
    for part in ENCODERS:
        if _encoder_digest(name, folder / part) != _encoder_digest(name, student / part):
            raise UserError(
                f"{name}: it is given the latents and texts of model.path, {student}, and {folder} "
                f"has another {part}; take a teacher that was trained with the same one"
            )


def _encoder_digest(name: str, part: Path) -> str:
    if part.name == "tokenizer":
        return folder_digest(part, part_endings("tokenizer"))
    settings = read_object(part / "config.json", setting=name)
    named = {key: value for key, value in settings.items() if not key.startswith("_")}
    return folder_digest(part, ("safetensors",)) + json.dumps(named, sort_keys=True)


def _encoder_parts(encoders: "FrozenParts") -> dict[str, Part]:
    """What the latents and texts that it is given depend on; where they were made, in one part."""
    parts: dict[str, Part] = {}
    environment: list[Part] = []
    for encoder, found in (("vae", encoders.vae_parts), ("text", encoders.text.parts)):
        for key, part in found.items():
            if key in ENVIRONMENT:
                environment.append((encoder, key, part))
            else:
                parts[key if key in COMPONENTS else f"{encoder}_{key}"] = part
    return {**parts, "encoders": tuple(environment)}
