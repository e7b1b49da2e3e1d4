"""A random pipeline folder with SDXL's architecture, small enough to build in every test session.

    folder = write_tiny_pipeline(tmp_path / "tiny")     # six megabytes; family="sd" for SD 1.5's,
                                                        # "sdxl-lcm" for one with LCM's UNet,
                                                        # "sdxl-inpaint" for nine channels
    pipeline = load_model(folder)                    # ours
    StableDiffusionXLPipeline.from_pretrained(folder)   # theirs

UNet of 32 and 64 channels with one layer a level, cross-attention 32 wide, groups of 8; an f4
autoencoder; two CLIP towers 8 and 24 wide, the second with projection (diffusers tells the towers
of a single file apart by their widths); a byte-level vocabulary of 522 tokens. Pictures are 32 px,
latents 8x8x4. Weights are normal with the variance that keeps activations near one; biases and
norm scales are random too, so that a dropped one shows.
"""

import json
import math
from pathlib import Path

import flax.traverse_util
import numpy as np

from tlcm_jax.families.base import abstract_params
from tlcm_jax.io.json_files import write_json
from tlcm_jax.io.pipeline_folder import write_component
from tlcm_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.models.vae import AutoencoderKL, VAEConfig

MERGES = ("r e", "re d</w>", "c a", "ca t</w>", "o f</w>", "i c", "ic o", "ico n</w>")

UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": [2, 4],
    "block_out_channels": [32, 64],
    "cross_attention_dim": 32,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 64,
    "sample_size": 8,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 32,
    "scaling_factor": 0.5,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
TOWER = {
    "hidden_act": "quick_gelu",
    "intermediate_size": 32,
    "max_position_embeddings": 77,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 16,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


# What SD 1.5 has otherwise: one tower, projections by convolution, nothing but text.
SD_UNET = {
    **{k: v for k, v in UNET.items() if not k.startswith(("addition", "projection"))},
    "attention_head_dim": 4,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
SD_MODEL_INDEX = {
    **{k: v for k, v in MODEL_INDEX.items() if not k.endswith(("_2", "empty_prompt"))},
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}


def write_tiny_pipeline(
    folder: Path,
    *,
    family: str = "sdxl",
    prediction_type: str = "epsilon",
    seed: int = 0,
    dtype: str = "fp32",
) -> Path:
    """Writes the folder and returns it; the same arguments give the same bytes."""
    vocabulary = write_tokenizers(folder, ("tokenizer", "tokenizer_2")[: 1 + (family != "sd")])
    special = dict(
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
        vocab_size=len(vocabulary),
    )
    common = {**TOWER, **special, "model_type": "clip_text_model"}
    towers = {
        "text_encoder": {**common, "architectures": ["CLIPTextModel"], "hidden_size": 8},
        "text_encoder_2": {
            **common, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu",
            "hidden_size": 24,
        },
    }  # fmt: skip
    unet, index = UNET, MODEL_INDEX
    if family == "sd":
        unet, index = SD_UNET, SD_MODEL_INDEX
        towers = {"text_encoder": {**towers["text_encoder"], "hidden_size": 32}}
    if family == "sdxl-lcm":
        unet = {**UNET, "time_cond_proj_dim": 12}
    if family == "sdxl-inpaint":
        unet = {**UNET, "in_channels": 9}
        index = {**MODEL_INDEX, "_class_name": "StableDiffusionXLInpaintPipeline"}
    networks = {
        "unet": (unet, UNet2DConditionModel(UNetConfig.from_dict(unet))),
        "vae": (VAE, AutoencoderKL(VAEConfig.from_dict(VAE))),
        **{
            name: (config, CLIPTextModel(CLIPTextConfig.from_dict(config)))
            for name, config in towers.items()
        },
    }
    for i, (name, (config, network)) in enumerate(networks.items()):
        params = random_params(abstract_params(network), np.random.default_rng([seed, i]))
        write_component(folder / name, config, params, dtype)
    scheduler = {**SCHEDULER, "prediction_type": prediction_type}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)
    return folder


def random_params(shapes: dict, rng: np.random.Generator) -> dict:
    """Random weights for a tree of shapes, drawn leaf by leaf."""

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        if path[-1] == "kernel":
            return noise / np.float32(math.sqrt(math.prod(shape[:-1])))
        if path[-1] == "embedding":
            return noise * np.float32(0.3)
        return noise * np.float32(0.1) + (path[-1] == "scale")

    flat = flax.traverse_util.flatten_dict(shapes)
    return flax.traverse_util.unflatten_dict(
        {path: draw(path, leaf.shape) for path, leaf in flat.items()}
    )


def random_adapter(adapter: dict, rng: np.random.Generator, size: float = 0.05) -> dict:
    """An adapter (`models.lora.init`) with every factor random: one that changes the output."""
    flat = flax.traverse_util.flatten_dict(adapter)
    return flax.traverse_util.unflatten_dict(
        {path: size * rng.standard_normal(leaf.shape, np.float32) for path, leaf in flat.items()}
    )


def write_tokenizers(
    folder: Path, names: tuple[str, ...] = ("tokenizer", "tokenizer_2")
) -> dict[str, int]:
    """Writes `tokenizer` and `tokenizer_2`, which pads with "!" as SDXL's does."""
    symbols = _byte_symbols()
    words = [symbol + "</w>" for symbol in symbols]
    joined = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*symbols, *words, *joined, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    for name in names:
        pad = "!" if name == "tokenizer_2" else "<|endoftext|>"
        marks = {**special, "pad_token": pad}
        write_json(
            folder / name / "tokenizer_config.json",
            {**marks, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
        )
        write_json(folder / name / "special_tokens_map.json", marks)
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        merges = "#version: 0.2\n" + "\n".join(MERGES) + "\n"
        (folder / name / "merges.txt").write_text(merges, encoding="utf-8")
    return vocabulary


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, "!" first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
