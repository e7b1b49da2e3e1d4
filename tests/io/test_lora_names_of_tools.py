"""Every key of a LoRA of full SDXL and SD 1.5, by the naming rules of the programs that take it.

Rank 1, zeros: names and shapes of the whole network, no weights of it.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support import ldm_unet, lora_tools
from tests.support.families import SD_15
from tests.support.published import UNET, write_sdxl_configs
from tlcm_jax.families.base import abstract_params
from tlcm_jax.families.load import abstract_model
from tlcm_jax.families.product import Student
from tlcm_jax.families.stable_diffusion import LORA_NAMES, StableDiffusion
from tlcm_jax.io.lora_files import read_lora
from tlcm_jax.models import lora
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.unet_config import UNetConfig

CONFIGS = {"sdxl": UNET, "sd": SD_15}
LDM = {"sdxl": ldm_unet.SDXL, "sd": ldm_unet.SD15}


@pytest.fixture(scope="module", params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, tmp_path_factory):
    """Shapes of all networks; SD 1.5 is SDXL's folder without the second tower."""
    folder = write_sdxl_configs(tmp_path_factory.mktemp(family))
    model = abstract_model(folder)
    if family == "sd":
        params = abstract_params(UNet2DConditionModel(UNetConfig.from_dict(SD_15)))
        rest = {k: v for k, v in model.params.items() if k != "text_encoder_2"}
        model = model.without_weights().with_params(**{**rest, "unet": params})
    return model


@pytest.fixture(scope="module")
def adapter(model):
    unet = model.params["unet"]
    shapes = jax.eval_shape(lambda key: lora.init(unet, lora.TARGETS, 1, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float16), shapes)


@pytest.fixture(scope="module")
def write(model, adapter, tmp_path_factory):
    def write(product):
        folder = tmp_path_factory.mktemp(product)
        chosen = StableDiffusion.products[product]
        student = Student(model=model, adapter=adapter, params=None, dtype="fp16", metadata={})
        chosen.write(student, folder)
        return folder / chosen.file

    return write


@pytest.fixture(scope="module")
def kohya(write):
    return load_file(write("kohya"))


@pytest.fixture(scope="module")
def layers(family):
    return ldm_unet.layers(LDM[family])


def stems(tensors):
    return {key.partition(".")[0] for key in tensors}


def assert_fits(tensors, stem, shape):
    """The factors of a layer make an update of its shape."""
    down, up = (tensors[f"{stem}.lora_{side}.weight"] for side in ("down", "up"))
    assert down.shape == (1, *shape[1:]) and up.shape == (shape[0], 1, *(1,) * (len(shape) - 2))
    assert tensors[f"{stem}.alpha"].shape == () and tensors[f"{stem}.alpha"] == 1


def test_as_many_layers_as_the_published_lcm_loras(family, kohya):
    assert len(stems(kohya)) == {"sdxl": 788, "sd": 278}[family]


def test_comfyui_and_forge_take_every_key(kohya, layers):
    known = lora_tools.comfyui(layers)
    assert len(kohya) == 3 * len(stems(kohya))
    taken = {stem: known.get(stem) for stem in stems(kohya)}
    assert None not in taken.values() and len(set(taken.values())) == len(taken)
    for stem, layer in taken.items():
        assert_fits(kohya, stem, layers[layer][1])


def test_a1111_takes_every_key(kohya, layers):
    taken = {stem: lora_tools.a1111(stem, layers) for stem in stems(kohya)}
    assert None not in taken.values() and len(set(taken.values())) == len(taken)
    for stem, layer in taken.items():
        assert_fits(kohya, stem, layers[layer][1])


def test_sd_scripts_takes_every_key(kohya, family, layers):
    known = lora_tools.sd_scripts(layers, sdxl=family == "sdxl")
    assert stems(kohya) == known.keys()  # our targets are all that it puts LoRAs into
    for stem, layer in known.items():
        assert_fits(kohya, stem, layers[layer][1])


def test_we_read_it_back(write, model, adapter):
    read = read_lora(write("kohya"), model.params["unet"], LORA_NAMES)
    assert jax.tree.structure(read) == jax.tree.structure(adapter)


def test_diffusers_takes_every_key(family, kohya, adapter):
    reason = "diffusers' converter is run here"
    torch = pytest.importorskip("torch", reason=reason)
    diffusers = pytest.importorskip("diffusers", reason=reason)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(CONFIGS[family])
    mixin = {"sdxl": diffusers.StableDiffusionXLPipeline, "sd": diffusers.StableDiffusionPipeline}
    tensors = {key: torch.from_numpy(value) for key, value in kohya.items()}
    found, alphas = mixin[family].lora_state_dict(tensors, unet_config=unet.config)
    assert len(found) == 2 * len(alphas) == 2 * len(stems(kohya))
    found = {key.removeprefix("unet."): value for key, value in found.items()}
    found = diffusers.utils.convert_unet_state_dict_to_peft(found)
    modules = dict(unet.named_modules())
    adapted = {key.partition(".lora_")[0] for key in found}
    ours = jax.tree_util.tree_leaves_with_path(adapter)
    assert adapted == {".".join(k.key for k in path[:-1]) for path, _ in ours}
    for layer in adapted:
        shape = modules[layer].weight.shape
        down, up = (found[f"{layer}.lora_{side}.weight"].shape for side in "AB")
        assert down == (1, *shape[1:]) and up == (shape[0], 1, *(1,) * (len(shape) - 2))


def test_comfyui_takes_a_part_of_diffusers_lora(write, layers):
    """Why that product is for diffusers alone: the attention's names are others there."""
    known = lora_tools.comfyui(layers)
    stored = {key.split(".lora_")[0] for key in load_file(write("lora"))}
    taken = {name for name in stored if name in known}
    assert taken and not {name for name in taken if ".attn" in name}
    assert stored - taken == {name for name in stored if ".attn" in name}
