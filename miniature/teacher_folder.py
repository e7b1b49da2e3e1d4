"""What the teachers of both worlds share: SDXL's pipeline in small, and the folder it lies in."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tlcm_jax.io import names

TOWER = {
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_attention_heads": 3,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "layer_norm_eps": 1e-5,
    "model_type": "clip_text_model",
}
TEXT_ENCODERS = {
    "text_encoder": {
        **TOWER,
        "architectures": ["CLIPTextModel"],
        "hidden_act": "quick_gelu",
        "num_hidden_layers": 2,
        "projection_dim": 48,
    },
    "text_encoder_2": {
        **TOWER,
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "num_hidden_layers": 3,
        "projection_dim": 64,
    },
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
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def complete_folder(
    folder: Path, tokenizer: Path, unet: Mapping[str, Any], prediction_type: str
) -> None:
    """Writes what a pipeline folder holds besides its networks' weights.

    Args:
      folder: the pipeline's.
      tokenizer: a folder with CLIP's `vocab.json` and `merges.txt`.
      unet: the UNet's config.
      prediction_type: of its predictions, "epsilon", "v_prediction" or "sample".
    """

    def write(path: str, content: Mapping[str, Any]) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content, indent=2) + "\n")

    write("model_index.json", MODEL_INDEX)
    write("scheduler/scheduler_config.json", {**SCHEDULER, "prediction_type": prediction_type})
    write("unet/config.json", unet)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    # SDXL's second tokenizer pads with "!", which is id 0.
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokens = {**special, "unk_token": "<|endoftext|>", "pad_token": pad}
        write(
            f"{name}/tokenizer_config.json",
            {**tokens, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
        )
        write(f"{name}/special_tokens_map.json", tokens)
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(tokenizer / file, folder / name / file)


def save_unet(params: dict, folder: Path) -> None:
    """Writes the weights in fp16, whole or not at all."""
    tensors = {k: v.astype(np.float16) for k, v in names.to_torch(params).items()}
    path = folder / "unet" / _WEIGHTS
    save_file(tensors, path.with_suffix(".partial"), metadata={"format": "pt"})
    path.with_suffix(".partial").rename(path)
