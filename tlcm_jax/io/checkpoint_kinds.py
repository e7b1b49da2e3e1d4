"""What a file is that is no whole checkpoint of a known family, for messages."""

import re
from collections.abc import Collection
from pathlib import Path

# By the first bytes of what is no safetensors file.
_BYTES = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"GGUF", "a GGUF file, which is quantised; give the safetensors it was made from"),
    (b"PK\x03\x04", "a zip archive, as PyTorch's pickles are; give a safetensors file"),
    (b"\x80\x02", "a pickle under another name; give a safetensors file"),
    (b"\x1f\x8b", "packed by gzip; unpack it"),
    (b"\x89HDF", "an HDF5 file; give a safetensors file"),
)
_PAGE = re.compile(rb"\s*<(!doctype html|html|\?xml)", re.IGNORECASE)

# By the names of tensors; the first that matches.
_KEYS = (
    (r"\.lora_(A|B|down|up|mid)\b|[._]lora\.(up|down)\.|\.(hada|lokr)_|lora_linear_layer",
     "a LoRA, which goes onto a model with --lora"),
    (r"^(control_model|controlnet_cond_embedding)\.|^zero_convs\.",
     "a ControlNet, which goes with --control"),
    (r"double_blocks\.|single_transformer_blocks\.", "a Flux model, of a family not known here"),
    (r"joint_blocks\.|\.add_[kqv]_proj\.", "an SD3 model, of a family not known here"),
    (r"^(emb_params|clip_[lg])$|^string_to_param", "an embedding (textual inversion)"),
    (r"^(down_blocks|up_blocks|mid_block)\.", "a UNet alone, by diffusers' names"),
    (r"^(input_blocks|output_blocks|middle_block)\.", "a UNet alone"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.", "an autoencoder alone, which goes with --vae"),
    (r"^(text_model|transformer\.resblocks)\.", "a text encoder alone"),
    (r"^(vision_model|visual)\.", "a vision encoder"),
    (r"^body\.|^adapter\.", "a T2I-Adapter, which goes with --control"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
)  # fmt: skip
_WHOLE = "; give the model's diffusers folder, or a checkpoint that holds all networks"


def describe_bytes(path: Path) -> str | None:
    """What a file is that is not safetensors; None if its first bytes do not say."""
    with path.open("rb") as file:
        start = file.read(100)
    if not start:
        return "an empty file; fetch it again"
    if _PAGE.match(start):
        return "a web page (of a download that needs a login?); fetch it again"
    return next((kind for magic, kind in _BYTES if start.startswith(magic)), None)


def describe_keys(keys: Collection[str]) -> str | None:
    """What a safetensors file is, by its tensors' names; None if not known."""
    for pattern, kind in _KEYS:
        if any(re.search(pattern, key) for key in keys):
            return kind + (_WHOLE if "alone" in kind else "")
    return None


def describe_folder(folder: Path, class_name: str | None) -> str | None:
    """What a folder without `model_index.json` is; None if not known.

    Args:
      folder: it.
      class_name: of its `config.json`, if it has one.
    """
    if (folder / "adapter_config.json").is_file():
        return "a LoRA's folder, which goes onto a model with --lora"
    if class_name is not None:
        return f"one network alone ({class_name}){_WHOLE}"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files:
        return f"no pipeline folder; give one of its files: {', '.join(files[:5])}"
    inside = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
    return f"no pipeline folder, but {', '.join(inside[:5])} in it may be" if inside else None
