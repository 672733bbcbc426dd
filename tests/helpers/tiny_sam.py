"""Folders of tiny SAM 2 and SAM 3 video models: transformers' real classes, random weights."""

import json
from pathlib import Path
from typing import Any

import torch

SIDE = 64  # pixels of SAM 2's images here
SAM3_SIDE = 56
SAM3_GRID = SAM3_SIDE // 14
WIDTH = 128  # both split pointers to objects, this wide, into memories of 64
MEMORY = 64  # which is written into their attention


def write_sam2(folder: Path, **changes: Any) -> Path:
    """A Hiera of five blocks, 16 wide, with all parts of the video model."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    torch.manual_seed(0)
    size = SIDE // 16
    config = Sam2VideoConfig(
        image_size=SIDE,
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 16,
                "num_attention_heads": 1,
                "image_size": [SIDE, SIDE],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [16, 32, 64, 128],
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "window_size_per_stage": [8, 4, 4, 2],
                "global_attention_blocks": [3],
                "window_positional_embedding_background_size": [4, 4],
            },
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[4 * size, 4 * size], [2 * size, 2 * size], [size, size]],
            "fpn_hidden_size": WIDTH,
        },
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": SIDE, "patch_size": 16},
        mask_decoder_config={
            "hidden_size": WIDTH,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
        },
        memory_attention_hidden_size=WIDTH,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[size, size],
        memory_encoder_hidden_size=WIDTH,
        memory_encoder_output_channels=MEMORY,
        mask_downsampler_embed_dim=WIDTH,
        memory_fuser_num_layers=1,
        memory_fuser_embed_dim=WIDTH,
        memory_fuser_intermediate_dim=32,
        **changes,
    )
    model = Sam2VideoModel(config).eval()
    model.save_pretrained(folder)
    _write_processor(folder, SIDE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return folder


def write_sam3(folder: Path) -> Path:
    """A detector and a tracker of one or two layers, 32 wide, and a tokenizer of whole words."""
    from transformers import Sam3VideoConfig, Sam3VideoModel

    torch.manual_seed(0)
    config = Sam3VideoConfig(
        detector_config=_sam3_detector(),
        tracker_config=_sam3_tracker(),
        low_res_mask_size=4 * SAM3_GRID,
        # random weights are sure of nothing
        score_threshold_detection=0.2,
        new_det_thresh=0.2,
        hotstart_delay=0,
    )
    model = Sam3VideoModel(config).eval()
    model.save_pretrained(folder)
    _write_processor(folder, SAM3_SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    _write_tokenizer(folder)
    return folder


def _sam3_vision() -> dict[str, Any]:
    size = SAM3_GRID
    sizes = [[4 * size, 4 * size], [2 * size, 2 * size], [size, size]]
    return {
        "model_type": "sam3_vision_model",
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SAM3_SIDE,
            "pretrain_image_size": SAM3_SIDE,
            "window_size": 2,
            "global_attn_indexes": [1],
        },
        "fpn_hidden_size": WIDTH,
        "backbone_feature_sizes": sizes,
    }


def _sam3_detector() -> dict[str, Any]:
    small = {
        "hidden_size": WIDTH,
        "num_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return {
        "model_type": "sam3",
        "vision_config": _sam3_vision(),
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "projection_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "geometry_encoder_config": small,
        "detr_encoder_config": small,
        "detr_decoder_config": small | {"num_queries": 5},
        "mask_decoder_config": {"hidden_size": WIDTH, "num_attention_heads": 2},
    }


def _sam3_tracker() -> dict[str, Any]:
    return {
        "model_type": "sam3_tracker_video",
        "image_size": SAM3_SIDE,
        "vision_config": _sam3_vision(),
        "prompt_encoder_config": {"hidden_size": WIDTH, "image_size": SAM3_SIDE, "patch_size": 14},
        "mask_decoder_config": {
            "hidden_size": WIDTH,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
        },
        "memory_attention_hidden_size": WIDTH,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 32,
        "memory_attention_rope_feat_sizes": [SAM3_GRID, SAM3_GRID],
        "memory_encoder_hidden_size": WIDTH,
        "memory_encoder_output_channels": MEMORY,
        "mask_downsampler_embed_dim": WIDTH,
        "memory_fuser_num_layers": 1,
        "memory_fuser_embed_dim": WIDTH,
        "memory_fuser_intermediate_dim": 32,
    }


def _write_processor(
    folder: Path, side: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    values = {"do_normalize": True, "image_mean": mean, "image_std": std, "resample": 2}
    values |= {"do_resize": True, "size": {"height": side, "width": side}}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(values))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "red", "blue", "plain", "striped", "circle"]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
