"""Every kind of LoRA merged into a UNet, against PEFT's own merge and LyCORIS' formulae.

Weights are random throughout. PEFT's adapters are made, saved and merged by PEFT; what it has no
class for (LoCon with a kernel in the middle, magnitudes by column) is written out in torch.
"""

import numpy as np
import pytest

reason = "what LoRAs do is compared with peft and diffusers"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)
peft = pytest.importorskip("peft", reason=reason)

import flax.traverse_util  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from tests.support.tiny_pipeline import write_tiny_pipeline  # noqa: E402
from tlcm_jax.families.load import load_model  # noqa: E402
from tlcm_jax.io import names  # noqa: E402
from tlcm_jax.io.lora_stack import apply_loras  # noqa: E402
from tlcm_jax.models import lora  # noqa: E402

LAYERS = [
    "to_q", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "conv_in",
    "conv_out", "linear_1",
]  # fmt: skip
TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONFIGS = {
    "LoRA": peft.LoraConfig(r=3, lora_alpha=5),
    "LoRA, ranks and alphas by layer": peft.LoraConfig(
        r=3, rank_pattern={TO_Q: 5, "conv1": 2}, alpha_pattern={"conv1": 7}
    ),
    "LoRA, rank-stabilised": peft.LoraConfig(r=4, use_rslora=True),
    "DoRA": peft.LoraConfig(r=3, lora_alpha=5, use_dora=True),
    "LoHa": peft.LoHaConfig(r=3, alpha=5),
    "LoHa, cores": peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=2, alpha=5),
    "LoKr, both of low rank": peft.LoKrConfig(r=2, alpha=5, decompose_both=True),
    "LoKr, cores": peft.LoKrConfig(r=2, alpha=5, use_effective_conv2d=True, decompose_factor=4),
    "LoKr, whole": peft.LoKrConfig(r=64, alpha=5),
}


@pytest.fixture(scope="module", params=["sdxl", "sd"])
def world(request, tmp_path_factory):
    folder = write_tiny_pipeline(
        tmp_path_factory.mktemp("model") / request.param, family=request.param
    )
    return folder, load_model(folder, on_device=False)


def torch_unet(folder):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel.from_pretrained(str(folder / "unet"))


def merged(model, path):
    """The UNet's weights with a LoRA added, by PyTorch's names."""
    changed, adapter = apply_loras(model, [str(path)])
    params = changed.params["unet"]
    return names.to_torch(lora.merge(params, adapter) if adapter else params)


def assert_same_changes(ours, theirs, base):
    changed = 0
    for name, value in theirs.items():
        moved = np.linalg.norm(value - base[name])
        changed += moved > 1e-2 * np.linalg.norm(base[name])
        error = np.linalg.norm(ours[name] - value)
        assert error <= 1e-5 * max(moved, np.linalg.norm(value)), name
        assert moved > 0 or np.array_equal(ours[name], base[name])
    return changed


@pytest.mark.parametrize("kind", CONFIGS)
def test_as_peft_merges_it(world, tmp_path, kind):
    folder, model = world
    config = CONFIGS[kind]
    config.target_modules = LAYERS
    adapted = peft.get_peft_model(torch_unet(folder), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif any(part in name for part in ("lora_", "hada_", "lokr_")):
                parameter.normal_(std=0.3)
    adapted.save_pretrained(str(tmp_path))
    theirs = {k: v.detach().numpy() for k, v in adapted.merge_and_unload().state_dict().items()}
    base = names.to_torch(model.params["unet"])
    assert theirs.keys() == base.keys()
    assert assert_same_changes(merged(model, tmp_path), theirs, base) > 30


def normal(*shape, seed=0):
    return 0.3 * np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def conv_delta(*kernels):
    """The kernel that convolutions one after the other come to, by convolving impulses."""
    width, size = kernels[0].shape[1], 3
    impulse = torch.zeros(width, width, size + 2, size + 2)
    impulse[range(width), range(width), size // 2 + 1, size // 2 + 1] = 1
    for kernel in kernels:
        impulse = torch.nn.functional.conv2d(
            impulse, torch.from_numpy(kernel), padding=kernel.shape[-1] // 2
        )
    return impulse[:, :, 1:4, 1:4].flip(2, 3).transpose(0, 1).numpy()


def lycoris(kind, out, inner, window):
    """Parts of a layer by LyCORIS' names and, with alpha 2, what they come to."""
    flat = inner * int(np.prod(window or (1,)))
    if kind == "LoCon":
        parts = {"lora_down.weight": normal(4, inner, 1, 1), "lora_mid.weight": normal(4, 4, 3, 3),
                 "lora_up.weight": normal(out, 4, 1, 1)}  # fmt: skip
        return parts, conv_delta(*parts.values()) * 2 / 4
    if kind == "LoHa":
        a, b, c, d = (
            normal(out, 4),
            normal(4, flat),
            normal(out, 4, seed=1),
            normal(4, flat, seed=1),
        )
        parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
        return parts, ((a @ b) * (c @ d)).reshape(out, inner, *window) * 2 / 4
    if kind == "LoKr":
        w1, a, b = normal(4, 2), normal(out // 4, 4), normal(4, flat // 2)
        w2 = torch.from_numpy(a @ b).reshape(out // 4, inner // 2, *window)
        first = torch.from_numpy(w1).reshape(4, 2, *(1 for _ in window))
        parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
        return parts, torch.kron(first, w2).numpy() * 2 / 4
    w1, w2 = normal(4, 2), normal(out // 4, inner // 2, *window)
    first = torch.from_numpy(w1).reshape(4, 2, *(1 for _ in window))
    return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(first, torch.from_numpy(w2)).numpy()


@pytest.mark.parametrize("magnitude", ["none", "row", "column"])
@pytest.mark.parametrize("kind", ["LoCon", "LoHa", "LoKr", "LoKr, whole"])
def test_lycoris_formulae(world, tmp_path, kind, magnitude):
    _, model = world
    base = names.to_torch(model.params["unet"])
    layers = ["mid_block.resnets.0.conv1", TO_Q][: 1 if kind == "LoCon" else 2]
    tensors, theirs = {}, dict(base)
    for layer in layers:
        weight = base[f"{layer}.weight"]
        parts, change = lycoris(kind, *weight.shape[:2], weight.shape[2:])
        stem = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{stem}.{part}": value for part, value in parts.items()}
        tensors[f"{stem}.alpha"] = np.array(2, np.float32)
        new = weight + change
        if magnitude != "none":
            kept = 0 if magnitude == "row" else 1
            axes = tuple(axis for axis in range(weight.ndim) if axis != kept)
            norm = np.sqrt(np.sum(new**2, axis=axes, keepdims=True))
            scale = 1 + normal(*norm.shape) ** 2
            tensors[f"{stem}.dora_scale"] = scale
            new = new / norm * scale
        theirs[f"{layer}.weight"] = new
    # A layer of low rank beside them stays one.
    plain = {"lora_A": normal(3, 64), "lora_B": normal(64, 3)}
    other = TO_Q.replace("to_q", "to_v")
    tensors |= {f"unet.{other}.{part}.weight": value for part, value in plain.items()}
    theirs[f"{other}.weight"] = base[f"{other}.weight"] + plain["lora_B"] @ plain["lora_A"]
    save_file(tensors, tmp_path / "lora.safetensors")
    assert assert_same_changes(merged(model, tmp_path), theirs, base) == len(layers) + 1
    _, adapter = apply_loras(model, [str(tmp_path)])
    flat = flax.traverse_util.flatten_dict(adapter)
    assert (len(flat) == 2) == (kind != "LoCon" or magnitude != "none")
    half, _ = apply_loras(model, [f"{tmp_path}:0.5"])
    name = f"{TO_Q}.weight"
    moved = names.to_torch(half.params["unet"])[name] - base[name]
    np.testing.assert_allclose(moved, (theirs[name] - base[name]) / 2, rtol=1e-4, atol=1e-6)


def test_the_same_factors_for_linear_layers_and_1x1_convolutions(world, tmp_path):
    """SDXL projects by linear layers, SD 1.x by 1x1 convolutions; files have either's shapes."""
    _, model = world
    base, layer = names.to_torch(model.params["unet"]), "mid_block.attentions.0.proj_in"
    down, up = normal(3, 64), normal(64, 3)
    weight = base[f"{layer}.weight"]
    theirs = base | {f"{layer}.weight": weight + (up @ down).reshape(weight.shape)}
    for ones in ((), (1, 1)):
        stored = {"lora_A": down.reshape(3, 64, *ones), "lora_B": up.reshape(64, 3, *ones)}
        tensors = {f"unet.{layer}.{part}.weight": value for part, value in stored.items()}
        save_file(tensors, tmp_path / "lora.safetensors")
        assert assert_same_changes(merged(model, tmp_path), theirs, base) == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"hada_w1_a": (64, 4), "hada_w1_b": (4, 64), "hada_w2_a": (64, 4)}, "no hada_w2_b"),
        ({"lokr_w1": (5, 2), "lokr_w2": (16, 32)}, r"has lokr_w1 \(5, 2\), lokr_w2 .* a weight"),
        ({"lokr_w1": (4, 2), "lokr_w2_a": (16, 3)}, "no lokr_w2_b"),
        ({"lokr_w1": (64, 64), "lokr_w2": (64, 64)}, "for a weight"),
        ({"dora_scale": (64, 1)}, "no lora_A"),
        ({"lora_down.weight": (4, 64), "lora_up.weight": (64, 4), "dora_scale": (3, 1)}, "dora_sc"),
        ({"lora_down.weight": (4, 64), "lora_up.weight": (64, 4), "alpha": (2,)}, "alpha of shape"),
        ({"lora_down.weight": (4, 63), "lora_up.weight": (64, 4)}, r"lora_A \(4, 63\)"),
        ({"lora_down.weight": (), "lora_up.weight": ()}, r"lora_A \(\)"),
    ],
)
def test_parts_that_do_not_fit(world, tmp_path, parts, message):
    stem = "lora_unet_" + TO_Q.replace(".", "_")
    save_file(
        {f"{stem}.{part}": np.asarray(normal(*shape)) for part, shape in parts.items()},
        tmp_path / "lora.safetensors",
    )
    with pytest.raises(ValueError, match=message):
        apply_loras(world[1], [str(tmp_path)])
