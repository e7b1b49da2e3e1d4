"""Names that LoRA files of all years and programs have for layers of SDXL, and what is no LoRA.

The keys are as the programs named beside them write them, for SDXL's own numbers of blocks.
"""

import numpy as np
import pytest
from safetensors.numpy import save_file

from tlcm_jax.families.stable_diffusion import LORA_NAMES
from tlcm_jax.io.lora_files import read_networks
from tlcm_jax.io.lora_names import find_parts, split_key

RESNETS = [
    *(f"down_blocks.{b}.resnets.{i}" for b in range(3) for i in range(2)),
    *(f"mid_block.resnets.{i}" for i in range(2)),
    *(f"up_blocks.{b}.resnets.{i}" for b in range(3) for i in range(3)),
]
ATTENTIONS = [
    *(f"down_blocks.{b}.attentions.{i}" for b in (1, 2) for i in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{b}.attentions.{i}" for b in (0, 1) for i in range(3)),
]  # fmt: skip
UNET = [
    *(f"{r}.{layer}" for r in RESNETS for layer in ("conv1", "time_emb_proj", "conv_shortcut")),
    *(f"{a}.{layer}" for a in ATTENTIONS for layer in (
        "proj_in", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0",
        "transformer_blocks.0.attn2.to_k", "transformer_blocks.0.ff.net.0.proj",
    )),
    "down_blocks.0.downsamplers.0.conv", "down_blocks.1.downsamplers.0.conv",
    "up_blocks.0.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv", "conv_in", "conv_out",
    "time_embedding.linear_1", "add_embedding.linear_2",
]  # fmt: skip
TOWER = [
    f"text_model.encoder.layers.{i}.{layer}"
    for i in (0, 11)
    for layer in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
]
NETWORKS = {"unet": UNET, "text_encoder": TOWER, "text_encoder_2": [*TOWER, "text_projection"]}
LAYERS = [(network, name) for network, names in NETWORKS.items() for name in names]
TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"
FC1 = "text_model.encoder.layers.11.mlp.fc1"
OUT_PROJ = "text_model.encoder.layers.0.self_attn.out_proj"


@pytest.mark.parametrize(
    ("key", "network", "layer", "part"),
    [
        # diffusers, of today and of each former year
        (f"unet.{TO_Q}.lora_A.weight", "unet", TO_Q, "lora_A"),
        (f"unet.{TO_Q}.lora.down.weight", "unet", TO_Q, "lora_A"),
        (f"unet.{TO_OUT}.lora.up.weight", "unet", TO_OUT, "lora_B"),
        (f"unet.{TO_Q.replace('.to_q', '.processor.to_q_lora')}.down.weight", "unet", TO_Q,
         "lora_A"),
        (f"{TO_OUT.replace('.to_out.0', '.processor.to_out_lora')}.up.weight", "unet", TO_OUT,
         "lora_B"),
        (f"unet.{TO_OUT.removesuffix('.0')}.lora_A.weight", "unet", TO_OUT, "lora_A"),
        (f"unet.{TO_Q}.lora_magnitude_vector", "unet", TO_Q, "magnitude"),
        (f"unet.{TO_Q}.lora_magnitude_vector.weight", "unet", TO_Q, "magnitude"),
        ("unet.up_blocks.0.upsamplers.0.conv.lora.down.weight", "unet",
         "up_blocks.0.upsamplers.0.conv", "lora_A"),
        (f"text_encoder.{Q_PROJ}.lora_linear_layer.up.weight", "text_encoder", Q_PROJ, "lora_B"),
        (f"text_encoder.{Q_PROJ.replace('q_proj', 'to_q_lora')}.down.weight", "text_encoder",
         Q_PROJ, "lora_A"),
        (f"text_encoder.{OUT_PROJ.replace('out_proj', 'to_out_lora')}.up.weight", "text_encoder",
         OUT_PROJ, "lora_B"),
        (f"text_encoder.{Q_PROJ.removeprefix('text_model.')}.lora_A.weight", "text_encoder",
         Q_PROJ, "lora_A"),
        (f"text_encoder_2.{FC1}.lora_B.weight", "text_encoder_2", FC1, "lora_B"),
        ("text_encoder_2.text_projection.lora_A.weight", "text_encoder_2", "text_projection",
         "lora_A"),
        # PEFT
        (f"base_model.model.{TO_Q}.lora_A.default.weight", "unet", TO_Q, "lora_A"),
        (f"base_model.model.{TO_Q}.lora_B.my_style.weight", "unet", TO_Q, "lora_B"),
        (f"unet.base_model.model.{TO_Q}.lora_A.weight", "unet", TO_Q, "lora_A"),
        (f"text_encoder.base_model.model.{FC1}.lora_A.weight", "text_encoder", FC1, "lora_A"),
        (f"base_model.model.{TO_Q}.hada_w1_a", "unet", TO_Q, "hada_w1_a"),
        (f"base_model.model.{TO_Q}.lokr_t2", "unet", TO_Q, "lokr_t2"),
        # kohya and LyCORIS, by diffusers' blocks and by the single-file checkpoint's
        (f"lora_unet_{TO_Q.replace('.', '_')}.lora_down.weight", "unet", TO_Q, "lora_A"),
        (f"lora_unet_{TO_Q.replace('.', '_')}.alpha", "unet", TO_Q, "alpha"),
        (f"lycoris_{TO_Q.replace('.', '_')}.lokr_w1", "unet", TO_Q, "lokr_w1"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.dora_scale", "unet", TO_Q,
         "dora_scale"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_mid.weight", "unet",
         TO_OUT, "lora_mid"),
        ("lora_unet_output_blocks_2_2_conv.lora_up.weight", "unet",
         "up_blocks.0.upsamplers.0.conv", "lora_B"),
        ("lora_unet_input_blocks_3_0_op.alpha", "unet", "down_blocks.0.downsamplers.0.conv",
         "alpha"),
        ("lora_unet_middle_block_2_in_layers_2.hada_t1", "unet", "mid_block.resnets.1.conv1",
         "hada_t1"),
        ("lora_unet_output_blocks_8_0_emb_layers_1.lora_down.weight", "unet",
         "up_blocks.2.resnets.2.time_emb_proj", "lora_A"),
        ("lora_unet_input_blocks_0_0.lora_down.weight", "unet", "conv_in", "lora_A"),
        ("lora_unet_out_2.lora_down.weight", "unet", "conv_out", "lora_A"),
        ("lora_unet_time_embed_0.lora_down.weight", "unet", "time_embedding.linear_1", "lora_A"),
        ("lora_unet_label_emb_0_2.lora_down.weight", "unet", "add_embedding.linear_2", "lora_A"),
        (f"lora_te1_{Q_PROJ.replace('.', '_')}.lora_down.weight", "text_encoder", Q_PROJ,
         "lora_A"),
        (f"lora_te_{Q_PROJ.replace('.', '_')}.lora_down.weight", "text_encoder", Q_PROJ, "lora_A"),
        (f"lora_te2_{FC1.replace('.', '_')}.lora_up.weight", "text_encoder_2", FC1, "lora_B"),
        ("lora_te1_encoder_layers_11_mlp_fc1.alpha", "text_encoder", FC1, "alpha"),
        ("lora_te2_text_projection.lora_down.weight", "text_encoder_2", "text_projection",
         "lora_A"),
        # ComfyUI's own
        ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A.weight", "unet",
         TO_Q, "lora_A"),
        ("diffusion_model.output_blocks.2.2.conv.lora_up.weight", "unet",
         "up_blocks.0.upsamplers.0.conv", "lora_B"),
        (f"text_encoders.clip_g.transformer.{FC1}.lora_down.weight", "text_encoder_2", FC1,
         "lora_A"),
        (f"text_encoders.clip_l.transformer.{FC1}.lora_B.weight", "text_encoder", FC1, "lora_B"),
        (f"clip_g.{FC1}.lora_B.weight", "text_encoder_2", FC1, "lora_B"),
    ],
)  # fmt: skip
def test_names(key, network, layer, part):
    parts, strays = find_parts([key], LAYERS, LORA_NAMES)
    assert strays == [] and parts == {(network, layer): {part: key}}


@pytest.mark.parametrize(
    "key",
    ["unet.conv1.lora_A.weight", f"unet.{TO_Q}.lora_C.weight", f"unet.{TO_Q}", "alpha", ".alpha",
     f"lora_unet_{TO_Q.replace('.', '_')}_.alpha", "lora_te1_text_projection.alpha"],
)  # fmt: skip
def test_what_names_no_layer(key):
    assert find_parts([key], LAYERS, LORA_NAMES) == ({}, [key])


def test_a_layer_by_both_blocks_names_is_read_by_diffusers(
    twice=("lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_down_blocks_0_resnets_0_conv1"),
):
    keys = [f"{stem}.{part}" for stem in twice for part in ("lora_down.weight", "alpha")]
    for order in (keys, keys[::-1]):
        parts, strays = find_parts(order, LAYERS, LORA_NAMES)
        assert strays == []
        assert parts == {
            ("unet", "down_blocks.0.resnets.0.conv1"): {
                "lora_A": f"{twice[1]}.lora_down.weight", "alpha": f"{twice[1]}.alpha",
            }
        }  # fmt: skip


def test_a_tower_s_layer_without_its_network_may_be_either():
    with pytest.raises(ValueError, match="may be .*mlp.fc1 and .*mlp.fc1; convert the file"):
        find_parts([f"base_model.model.{FC1}.lora_A.weight"], LAYERS, LORA_NAMES)


def test_every_key_of_two_parts():
    assert split_key("a.b.lora_down.weight") == ("a.b", "lora_A")
    assert split_key("a.down.weight") == ("a", "lora_A")
    assert split_key("a.weight") is None


FLUX = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
STEM = "lora_unet_" + TO_Q.replace(".", "_")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([f"base_model.model.{TO_Q}.ia3_l"], "an IA3 file"),
        ([f"{STEM}.on_input", f"{STEM}.weight"], "an IA3 file"),
        ([f"base_model.model.{TO_Q}.oft_R.default.weight", f"{STEM}.oft_r"], "an OFT file"),
        ([f"{STEM}.oft_blocks", f"{STEM}.alpha"], "an OFT file"),
        ([f"base_model.model.{TO_Q}.boft_R"], "a BOFT file"),
        ([f"base_model.model.{TO_Q}.vera_lambda_b"], "a VeRA file"),
        ([f"{STEM}.a1.weight", f"{STEM}.b1.weight"], "a GLoRA file"),
        ([f"{STEM}.diff", f"{STEM}.diff_b"], r"a diff/full-weights file"),
        (["lora_unet_down_blocks_0_resnets_0_norm1.w_norm"], "a file that changes norm layers"),
        ([f"{STEM}.lora_down.weight", "unet.x.w_norm"], "a file that changes norm layers"),
        ([f"unet.{TO_Q}.lora_B.bias"], "a LoRA with biases"),
        ([FLUX], "a Flux LoRA"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "a Flux LoRA"),
        (["transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight"], "an SD3 LoRA"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"], "an SD3 LoRA"),
        (["diffusion_model.blocks.0.cross_attn.q.lora_A.weight"], "a Wan LoRA"),
        (["transformer.layers.0.attn.to_q.lora_A.weight"], "a LoRA for a diffusion transformer"),
        (["down_blocks.0.motion_modules.0.to_q.lora_A.weight"], "a motion module's LoRA"),
        (["lllite_unet_input_blocks_4_1.down.0.weight"], "a ControlNet-LLLite"),
        (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
        (["ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["emb_params"], "an embedding"),
        (["clip_g", "clip_l"], "an embedding"),
        (["model.diffusion_model.out.2.weight"], "a whole checkpoint, which goes with --model"),
        (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a UNet's weights"),
        (["x"], "holds no LoRA"),
    ],
)
def test_what_is_no_lora_is_named(tmp_path, keys, message):
    networks = {"unet": {TO_Q: {"kernel": np.zeros((4, 4))}}}
    save_file({key: np.ones((4, 4), np.float32) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors (is|holds).*{message.split(' ', 1)[-1]}"):
        read_networks(tmp_path / "x.safetensors", networks, LORA_NAMES)


@pytest.mark.parametrize(
    ("width", "own", "family"), [(768, 2048, "SD 1.x"), (2048, 768, "SDXL"), (1024, 768, "SD 2.x")]
)
def test_loras_of_other_families_are_named(tmp_path, width, own, family):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    stem = "lora_unet_" + layer.replace(".", "_")
    factors = {"lora_down.weight": (4, width), "lora_up.weight": (8, 4)}
    save_file({f"{stem}.{k}": np.ones(s, np.float32) for k, s in factors.items()},
              tmp_path / "x.safetensors")  # fmt: skip
    kernel = {"kernel": np.zeros((own, 8))}
    tree = {"unet": {layer.removesuffix(".attn2.to_k"): {"attn2": {"to_k": kernel}}}}
    with pytest.raises(ValueError, match=f"is a LoRA for {family}, which this model is not"):
        read_networks(tmp_path / "x.safetensors", tree, LORA_NAMES)
    te2 = f"lora_te2_{FC1.replace('.', '_')}.lora_down.weight"
    save_file({te2: np.ones((4, 8), np.float32)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="is a LoRA for SDXL"):
        read_networks(
            tmp_path / "y.safetensors", {**tree, "text_encoder": {FC1: kernel}}, LORA_NAMES
        )


def test_embeddings_beside_a_lora_are_left_out(tmp_path):
    keys = {f"unet.{TO_Q}.lora_A.weight": (2, 4), f"unet.{TO_Q}.lora_B.weight": (4, 2),
            "bundle_emb.style.string_to_param.*": (1, 4)}  # fmt: skip
    save_file({k: np.ones(s, np.float32) for k, s in keys.items()}, tmp_path / "x.safetensors")
    networks = {"unet": {TO_Q: {"kernel": np.zeros((4, 4))}}}
    found = read_networks(tmp_path / "x.safetensors", networks, LORA_NAMES)
    assert {*found.adapters["unet"][TO_Q]} == {"lora_A", "lora_B"}
