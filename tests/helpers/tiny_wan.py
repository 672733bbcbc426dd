"""A tiny Wan pipeline folder of real diffusers and transformers classes with random weights."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

CAPTIONS = [
    "a red striped circle moves left over a grey background",
    "a blue dotted square and a green triangle move down",
]


def tokenizer_of_captions() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"])
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,  # no caption of `shapes` is cut
    )


def text_encoder_of(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def _transformer() -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=4,
        rope_max_seq_len=32,
    )
    strengthen(model)
    return model


@torch.no_grad()
def strengthen(model: WanTransformer3DModel) -> None:
    """Wan's own initial weights keep text and neighbours faint; make every path count in a test."""
    for name, weight in model.named_parameters():
        if name.startswith("blocks.") and name.endswith("weight") and weight.ndim == 2:
            weight.mul_(2.0)


def autoencoder() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.1 * i - 0.5 for i in range(16)],
        latents_std=[0.5 + 0.1 * i for i in range(16)],
    )


def write_wan(folder: Path) -> Path:
    """Writes a pipeline folder: 4 blocks of width 48, autoencoder strides 4x8x8, 16 text tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tokenizer_of_captions()
        text_encoder = text_encoder_of(tokenizer)
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=autoencoder(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=_transformer(),
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `write_wan` writes."""
    return write_wan(tmp_path_factory.mktemp("tiny-wan"))
