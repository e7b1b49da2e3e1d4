"""The world's `AutoencoderKL`: the linear codec, written exactly into its weights.

The decoder is `exact_decoder`'s. In the encoder three strided convolutions hold pixels apart
(space to depth, 3 -> 12 -> 48 channels), and the last one applies the codec's matrix; each latent
is kept twice, as l and -l. Residual branches and attention are zero. The last norm and SiLU are
undone by

    silu(l) - silu(-l) = l,                                                     (1)

and by constant channels +C and -C in every group, beside which the latents do not move the norm's
statistics: with unit variance, its gain is off by less than 1 / C^2.

    python -m miniature.shapes.autoencoder --codec DIR/codec.npz --output DIR/shapes-xl/vae \\
        --scaling-factor 0.17
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from miniature.shapes.codec import CHANNELS, LinearCodec
from miniature.shapes.exact_decoder import exact_decoder
from tlcm_jax.io import names
from tlcm_jax.models.vae import AutoencoderKL, VAEConfig

CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [32, 48, 104, 112],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
    "scaling_factor": 1.0,
    "force_upcast": True,
}
_CONSTANT = 1024.0
_LOGVAR = -30.0


def network() -> AutoencoderKL:
    """The Flax module."""
    return AutoencoderKL(VAEConfig.from_dict(CONFIG))


def initial_params(codec: LinearCodec) -> dict:
    """The codec in both halves."""
    shapes = jax.eval_shape(network().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes["params"])
    params["encoder"] = exact_encoder(params["encoder"], codec)
    params["decoder"] = exact_decoder(params["decoder"], codec)
    for name in ("quant_conv", "post_quant_conv"):
        size = len(params[name]["bias"])
        params[name] = {"kernel": np.eye(size)[None, None], "bias": np.zeros(size)}
    return jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params)


def exact_encoder(shapes: dict, codec: LinearCodec) -> dict:
    """The encoder's parameters.

    Args:
      shapes: any parameters of an encoder of `CONFIG`.
      codec: what it computes.
    """
    params = jax.tree.map(np.zeros_like, shapes)

    def identity(conv: dict) -> None:
        middle = conv["kernel"].shape[0] // 2
        for channel in range(min(conv["kernel"].shape[2:])):
            conv["kernel"][middle, middle, channel, channel] = 1

    def to_depth(conv: dict, channels: int) -> None:
        for row in range(2):
            for column in range(2):
                for channel in range(channels):
                    place = (2 * row + column) * channels + channel
                    conv["kernel"][row, column, channel, place] = 1

    identity(params["conv_in"])
    for block in ("down_blocks.1", "down_blocks.2"):
        identity(params[block]["resnets.0"]["conv_shortcut"])
    to_depth(params["down_blocks.0"]["downsamplers.0"]["conv"], 3)
    to_depth(params["down_blocks.1"]["downsamplers.0"]["conv"], 12)
    # Pixel (row, column) of a block, by its three bits each: (4, 2, 1) were split off last first.
    weight = codec.weight.reshape(2, 2, 2, 2, 2, 2, 3, CHANNELS)  # r4 r2 r1 c4 c2 c1 rgb latent
    weight = weight.transpose(0, 3, 1, 4, 2, 5, 6, 7).reshape(2, 2, 48, CHANNELS)
    last = params["down_blocks.2"]["downsamplers.0"]["conv"]
    last["kernel"][:2, :2, :48, :CHANNELS] = weight
    last["bias"][:CHANNELS] = codec.bias
    width, groups = CONFIG["block_out_channels"][-1], CONFIG["norm_num_groups"]
    size, pairs = width // groups, CHANNELS // groups
    shortcut = params["down_blocks.3"]["resnets.0"]["conv_shortcut"]
    norm, out = params["conv_norm_out"], params["conv_out"]
    # A group of 14: three latents, their negatives, eight constants of mean 0; variance C^2.
    constants = _CONSTANT * np.array([2, -2, 1, -1, 1, -1, 1, -1], np.float32)
    for group in range(groups):
        for pair in range(pairs):
            latent, plus = group * pairs + pair, group * size + pair
            for place, sign in ((plus, 1), (plus + pairs, -1)):
                shortcut["kernel"][0, 0, latent, place] = sign
                norm["scale"][place] = _CONSTANT
                out["kernel"][1, 1, place, latent] = sign
        shortcut["bias"][group * size + 2 * pairs : (group + 1) * size] = constants
    out["bias"][CHANNELS:] = _LOGVAR
    return params


def save(folder: Path, params: dict, scaling_factor: float) -> None:
    """Writes a diffusers folder: fp16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(CONFIG, scaling_factor=scaling_factor)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {k: v.astype(np.float16) for k, v in names.to_torch(params).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codec", type=Path, required=True, help="a codec.npz")
    parser.add_argument("--output", type=Path, required=True, help="the vae folder to write")
    parser.add_argument("--scaling-factor", type=float, required=True)
    args = parser.parse_args()
    save(args.output, initial_params(LinearCodec.load(args.codec)), args.scaling_factor)


if __name__ == "__main__":
    main()
