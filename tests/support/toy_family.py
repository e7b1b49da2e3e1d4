"""A second model family, as unlike the first as the seam allows: what a new family has to write.

A rectified flow on latents that are vectors, `[b, 12]`; an MLP for a backbone, a bag of bytes for a
text encoder, one linear layer for a decoder, 8 x 8 images. Its folder is its own:
`model_index.json`, which names the pipeline's class, `toy.json` and `toy.safetensors`.

    register()                        # one line of the table
    write_toy(folder)                 # random weights
    load_model(folder)
"""

import dataclasses
import math
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from tests.support.tiny_pipeline import random_params
from tlcm_jax.diffusion.process import RectifiedFlow
from tlcm_jax.families import load
from tlcm_jax.families.base import LatentModel, abstract_params
from tlcm_jax.families.product import Product
from tlcm_jax.io import names
from tlcm_jax.io.files import cast, save_tensors
from tlcm_jax.io.json_files import read_object, write_json
from tlcm_jax.io.lora_export import write_lora
from tlcm_jax.io.lora_names import LoraNames
from tlcm_jax.io.model_card import PROJECT
from tlcm_jax.io.tensors import TensorFile, Tensors
from tlcm_jax.models.layers import Dense

KIND, SIDE, LATENT, TEXT, WIDTH = "ToyFlowPipeline", 8, 12, 6, 32
LORA = LoraNames(backbone="velocity")


class Velocity(nn.Module):
    """`(z [b, n], t [b], text [b, d])` to a velocity `[b, n]`, or the hidden states."""

    @nn.nowrap
    def example(self):
        return jnp.zeros((1, LATENT)), jnp.zeros(1), jnp.zeros((1, TEXT))

    @nn.compact
    def __call__(self, z, t, text, features=False):
        waves = 2 * math.pi * t[:, None] * jnp.arange(1, 4)
        x = jnp.concatenate([z, jnp.sin(waves), jnp.cos(waves), text], axis=-1)
        x = nn.silu(Dense(WIDTH, name="fc1")(x))
        x = nn.silu(Dense(WIDTH, name="fc2")(x))
        return x if features else Dense(LATENT, name="out")(x)


class Bytes(nn.Module):
    """`[b, n]` bytes, 0 for none, to their mean embedding `[b, d]`."""

    @nn.nowrap
    def example(self):
        return (jnp.zeros((1, 4), jnp.int32),)

    @nn.compact
    def __call__(self, ids):
        states = nn.Embed(256, TEXT, name="bytes")(ids) * (ids > 0)[..., None]
        return jnp.sum(states, axis=1) / jnp.maximum(jnp.sum(ids > 0, axis=1), 1)[:, None]


class Pixels(nn.Module):
    """`[b, n]` latents to images `[b, 8, 8, 3]` in 0 .. 1."""

    @nn.nowrap
    def example(self):
        return (jnp.zeros((1, LATENT)),)

    @nn.compact
    def __call__(self, z):
        return nn.sigmoid(Dense(SIDE * SIDE * 3, name="out")(z)).reshape(-1, SIDE, SIDE, 3)


NETWORKS = {"velocity": Velocity(), "text": Bytes(), "pixels": Pixels()}


class _Part(Tensors):
    """A component's tensors in the family's one file."""

    def __init__(self, tensors, name):
        self._tensors, self._prefix = tensors, f"{name}."

    def __getitem__(self, name):
        return self._tensors[self._prefix + name]

    def __iter__(self):
        keys = (key for key in self._tensors if key.startswith(self._prefix))
        return (key.removeprefix(self._prefix) for key in keys)

    def __len__(self):
        return len(list(iter(self)))

    def release(self):
        self._tensors.release()


def write_files(folder, params, config, dtype="fp32"):
    """The family's folder; `params` is a tree for each of `NETWORKS`."""
    write_json(folder / "model_index.json", {"_class_name": KIND})
    write_json(folder / "toy.json", config)
    tensors = {
        f"{component}.{name}": cast(name, value, dtype)
        for component, tree in params.items()
        for name, value in names.to_torch(tree).items()
    }
    save_tensors(folder / "toy.safetensors", tensors)


def _write_lora(student, folder):
    file = folder / "toy_lora.safetensors"
    write_lora(file, student.adapter, LORA, dtype=student.dtype, metadata=student.metadata)


def _write_pipeline(student, folder):
    params = {**student.model.params, "velocity": student.params}
    write_files(folder, params, student.model.configs["toy"], student.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ToyFlow(LatentModel):
    """The family, for the table of `families.load`."""

    backbone = "velocity"
    decoder = "pixels"
    lora_targets = ("fc1", "fc2")
    lora_names = LORA
    products = {
        "lora": Product(write=_write_lora, file="toy_lora.safetensors", has_weights=False),
        "pipeline": Product(write=_write_pipeline),
    }

    @classmethod
    def from_configs(cls, source, *, dtype, param_dtype, remat):
        config = read_object(source.folder / "toy.json")
        return cls(
            process=RectifiedFlow(float(config["shift"])),
            params={name: abstract_params(net, param_dtype) for name, net in NETWORKS.items()},
            configs={"toy": config},
            source=source.name,
            folder=str(source.folder),
        )

    def open_component(self, source, name):
        return _Part(TensorFile([source.folder / "toy.safetensors"]), name)

    @property
    def dtype(self):
        return jnp.float32

    @property
    def static_key(self):
        return self.process

    def card(self, recipe, product):
        return f"# {recipe.name}\n\nA toy's {product}, by {PROJECT}.\n"

    @property
    def text_params(self):
        return {"text": self.params["text"]}

    def tokenize(self, prompts, prompts_2=None, chunks=1):
        if prompts_2 is not None:
            raise ValueError("this model has one text encoder")
        ids = np.zeros((len(prompts), 24), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            text = prompt.encode()[: len(row)]
            row[: len(text)] = list(text)
        return (ids,)

    def encode_tokens(self, params, ids, resolution=None):
        return {"text": NETWORKS["text"].apply({"params": params["text"]}, ids[0])}

    def null_conditioning(self, resolution=None, like=None):
        return self.encode_tokens(self.params, self.tokenize([""]))

    def null_of(self, null, conditioning):
        return conditioning | null

    def latent_shape(self, resolution=None):
        if resolution not in (None, SIDE):
            raise ValueError(f"resolution {resolution}: this model makes {SIDE}")
        return (LATENT,)

    def predict(self, params, z, t, conditioning, lora=None, features=False, controls=()):
        variables = {"params": params} if lora is None else {"params": params, "lora": lora}
        found = NETWORKS["velocity"].apply(variables, z, t, conditioning["text"], features)
        return {"hidden": found[:, None, None]} if features else found

    @property
    def feature_widths(self):
        return {"hidden": WIDTH}

    @property
    def norm_groups(self):
        return 4

    def decode_latents(self, params, latents, tile=0):
        return NETWORKS["pixels"].apply({"params": params["pixels"]}, latents)


def register() -> None:
    """The family's line in the table."""
    load.FAMILIES[KIND] = f"{__name__}:ToyFlow"


def write_toy(folder: Path, seed: int = 0) -> Path:
    """Writes a model of random weights and returns its folder."""
    params = {
        name: random_params(abstract_params(network), np.random.default_rng([seed, i]))
        for i, (name, network) in enumerate(NETWORKS.items())
    }
    write_files(folder, params, {"shift": 3.0})
    return folder
