"""What a file is that is no LoRA of this model, by the names and shapes in it: for messages."""

import re
from collections.abc import Collection, Mapping

# By how a key ends, or what it holds; the first that matches. Adapters before models, as an
# adapter's keys name its model's layers too.
_KINDS = (
    (r"\.ia3_l(\.|$)|\.on_input$", "an IA3 file"),
    (r"\.boft_", "a BOFT file"),
    (r"[._]oft_(r|blocks|diag)", "an OFT file"),
    (r"\.vera_lambda", "a VeRA file"),
    (r"\.fourierft_", "a FourierFT file"),
    (r"\.(a1|a2|b1|b2)\.weight$", "a GLoRA file"),
    (r"\.(w_norm|b_norm)$", "a file that changes norm layers (w_norm, b_norm)"),
    (r"\.(diff|diff_b|set_weight|reshape_weight)$", "a diff/full-weights file (.diff)"),
    (r"modules_to_save|\.base_layer\.", "a PEFT adapter with whole layers in it"),
    (r"\.lora_(B|up)\.bias$", "a LoRA with biases (lora_bias)"),
    (r"\.lora_embedding_", "a LoRA of an embedding"),
    (r"lllite_", "a ControlNet-LLLite"),
    (r"^lora_controlnet$", "a control LoRA"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"controlnet_cond_embedding|^control_model\.|zero_convs\.", "a ControlNet"),
    (r"motion_modules|temporal_transformer", "a motion module's LoRA (AnimateDiff)"),
    (r"lora_prior_|^prior\.", "a LoRA for a prior (Stable Cascade or Kandinsky)"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "a Flux LoRA"),
    (r"joint_(transformer_)?blocks|add_[kqv]_proj|lora_te3_", "an SD3 LoRA"),
    (r"(^|\.|_)blocks[._]\d+[._](cross_attn|self_attn)", "a Wan LoRA"),
    (r"lora_unet_layers_|^(diffusion_model|transformer)\.", "a LoRA for a diffusion transformer"),
    (r"^(emb_params|clip_[lg]|string_to_param.*)$", "an embedding (textual inversion)"),
    (r"^model\.diffusion_model\.(?!.*lora)", "a whole checkpoint, which goes with --model"),
    (r"^(first_stage_model|decoder|encoder\.down)", "an autoencoder"),
    (r"^(down_blocks|up_blocks|mid_block|conv_in)\.(?!.*lora).*(weight|bias)$", "a UNet's weights"),
    (r"^text_model\.(?!.*lora).*(weight|bias)$", "a text encoder's weights"),
)  # fmt: skip

# Width of the text that a UNet's cross-attention reads, by family.
_TEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}


def describe(keys: Collection[str]) -> str | None:
    """What the file is that these keys, which nothing here reads, are of; None if not known."""
    for pattern, kind in _KINDS:
        if any(re.search(pattern, key) for key in keys):
            return kind
    return None


def other_family(
    shapes: Mapping[str, tuple[int, ...]], text_width: int | None, towers: int
) -> str | None:
    """The family that a LoRA's factors are for, if that shows and is not this model's.

    Args:
      shapes: of the file's tensors.
      text_width: of the model's cross-attention; None if it has none.
      towers: how many text encoders the model has.
    """
    widths = {
        shape[1]
        for key, shape in shapes.items()
        if re.search(r"attn2[._]to_[kv]\b.*(lora_A|down)|attn2[._]to_[kv]_lora\.down", key)
        and len(shape) > 1
    }
    for width in widths & _TEXT_WIDTHS.keys() if text_width in _TEXT_WIDTHS else ():
        if width != text_width:
            return f"a LoRA for {_TEXT_WIDTHS[width]}"
    second = any(re.match(r"lora_te2_|text_encoder_2\.", key) for key in shapes)
    return "a LoRA for SDXL" if second and towers < 2 else None
