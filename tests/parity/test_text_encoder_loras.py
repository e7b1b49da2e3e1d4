"""LoRAs that adapt text encoders too, against what diffusers makes of the same files."""

import numpy as np
import pytest

reason = "what LoRAs do is compared with diffusers"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)
pytest.importorskip("peft", reason=reason)

from safetensors.numpy import save_file  # noqa: E402

from tests.support.tiny_pipeline import write_tiny_pipeline  # noqa: E402
from tests.support.torch_networks import array, relative  # noqa: E402
from tlcm_jax.families.load import load_model  # noqa: E402
from tlcm_jax.io.lora_stack import apply_loras  # noqa: E402

RANK, ALPHA = 3, 6.0
LAYERS = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
UNET_LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TOWERS = {"sdxl": ("text_encoder", "text_encoder_2"), "sd": ("text_encoder",)}
PIPES = {
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd": diffusers.StableDiffusionPipeline,
}


def write(path, dialect, widths):
    """A LoRA file; `widths` is `(in, out)` by network and layer's name."""
    rng = np.random.default_rng(0)
    several = "text_encoder_2" in {network for network, _ in widths}
    stems = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if several else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    tensors = {}
    for (network, layer), (inner, outer) in widths.items():
        down = rng.standard_normal((RANK, inner), np.float32)
        up = 0.3 * rng.standard_normal((outer, RANK), np.float32)
        if dialect == "kohya":
            name = stems[network] + layer.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = np.asarray(ALPHA, np.float32)
        else:
            name = f"{network}.{layer}"
            ends = ("lora_A", "lora_B")
            if dialect == "diffusers 5.6":  # transformers' towers without projection
                name = name.replace("text_encoder.text_model.", "text_encoder.")
            if dialect == "diffusers 2023":
                linear = "lora_linear_layer" if network != "unet" else "lora"
                ends = (f"{linear}.down", f"{linear}.up")
            tensors |= {
                f"{name}.{end}.weight": value for end, value in zip(ends, (down, up), strict=True)
            }
    save_file(tensors, path)


@pytest.fixture(scope="module", params=["sdxl", "sd"])
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / request.param
    pipeline = load_model(write_tiny_pipeline(folder, family=request.param))
    wanted = {
        (tower, f"text_model.encoder.layers.{i}.{layer}")
        for tower in TOWERS[request.param]
        for i in (0, 1)
        for layer in LAYERS
    } | {("unet", UNET_LAYER)}
    widths = {}
    for network, layer in sorted(wanted):
        node = pipeline.params[network]
        for part in split(layer, node):
            node = node[part]
        widths[network, layer] = node["kernel"].shape
    return request.param, folder, pipeline, widths


def split(name, tree):
    """A dotted name as the keys of a tree whose own keys have dots in them."""
    while name:
        key = max((k for k in tree if name == k or name.startswith(k + ".")), key=len)
        yield key
        name, tree = name[len(key) + 1 :], tree[key]


@pytest.mark.parametrize("dialect", ["diffusers", "diffusers 5.6", "diffusers 2023", "kohya"])
def test_prompts_are_encoded_as_in_diffusers(world, tmp_path, dialect):
    family, folder, pipeline, widths = world
    path = tmp_path / "style.safetensors"
    write(path, dialect, widths)
    pipe = PIPES[family].from_pretrained(str(folder))
    plain = encode(pipe, family)
    pipe.load_lora_weights(str(path))
    expected = encode(pipe, family)

    adapted, adapter = apply_loras(pipeline, [str(path)])
    found = adapted.encode(["a red cat"])
    assert relative(found.prompt_embeds, expected[0]) < 1e-5
    assert relative(plain[0], expected[0]) > 1e-2
    if family == "sdxl":
        assert relative(found.pooled, expected[1]) < 1e-5
    down, up = (adapter_leaf(adapter, which) for which in ("lora_A", "lora_B"))
    theirs = pipe.unet.get_submodule(UNET_LAYER)
    update = theirs.get_delta_weight(theirs.active_adapters[0])
    assert relative(down @ up, array(update).T) < 1e-5
    # Half as strong is half the update, of the text encoders too.
    half, _ = apply_loras(pipeline, [f"{path}:0.5"])
    pipe.set_adapters(pipe.get_active_adapters(), adapter_weights=0.5)
    weaker = half.encode(["a red cat"]).prompt_embeds
    assert relative(weaker, encode(pipe, family)[0]) < 1e-5


def adapter_leaf(adapter, which):
    for part in split(UNET_LAYER, adapter):
        adapter = adapter[part]
    return adapter[which]


def encode(pipe, family):
    with torch.no_grad():
        if family == "sd":
            return [array(pipe.encode_prompt("a red cat", "cpu", 1, False)[0])]
        embeds, _, pooled, _ = pipe.encode_prompt(
            "a red cat", device="cpu", do_classifier_free_guidance=False
        )
    return [array(embeds), array(pooled)]


def test_text_encoders_alone(world, tmp_path):
    _, _, pipeline, widths = world
    path = tmp_path / "words.safetensors"
    write(path, "kohya", {key: shape for key, shape in widths.items() if key[0] != "unet"})
    adapted, adapter = apply_loras(pipeline, [str(path)])
    assert adapter is None and adapted.params["unet"] is pipeline.params["unet"]
    write(path, "kohya", {("text_encoder", "text_model.encoder.layers.7.mlp.fc1"): (8, 32)})
    with pytest.raises(
        ValueError, match="match no layer of unet, text_encoder.*: lora_te_text_model_enc"
    ):
        apply_loras(pipeline, [str(path)])
