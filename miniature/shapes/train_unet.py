"""Trains the UNet of shapes-xl on cached latents and captions.

    python -m miniature.shapes.train_unet --cache DIR/cache-r1 --output DIR/shapes-xl \\
        --workdir DIR/unet --scaling-factor 0.157 --tokenizer miniature/emoji-xl/tokenizer

The network predicts x0 ("sample"): latents this small are below the noise at nearly all times, so
that eps and v are nearly the input, which a network with norms passes on with an error of a tenth
and more; times sigma, that is the speckle which x0 then has. The error is weighted as EDM weights
it (Karras et al., arXiv 2206.00364, table 1), with latents of deviation s, so that every noise
level asks for a unit-variance answer, and less where the noise hides everything:

    loss = E (1 / r^2 + 1 / s^2) / (1 + (r / 5)^2) |x0 - x0_hat|^2,    r = sigma_t / alpha_t  (1)

Matrices are trained by Muon (Jordan et al. 2024), all else by Adam. A tenth of the samples has
the null conditioning (zeros, as SDXL has it). Weights, averaged, are written every `--save-every`
steps; the same command resumes. `--init` starts from another run's written weights (a rung up).
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from miniature.shapes import cache
from miniature.teacher_folder import SCHEDULER, complete_folder, save_unet
from tlcm_jax.diffusion.process import DiscreteVP
from tlcm_jax.diffusion.scheduler_config import process_from_config
from tlcm_jax.distillation.losses import mse
from tlcm_jax.io import names
from tlcm_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.training.fit import fit, trapezoid

CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": [3, 4],
    "block_out_channels": [96, 128],
    "center_input_sample": False,
    "cross_attention_dim": 96,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 24,
    "layers_per_block": 1,
    "norm_eps": 1e-5,
    # Few groups: with latents this small the noise makes up a norm's statistics, and their
    # fluctuation, 1 / sqrt(elements of a group), multiplies it.
    "norm_num_groups": 8,
    "out_channels": 24,
    "projection_class_embeddings_input_dim": 112,
    "sample_size": 8,
    "transformer_layers_per_block": [1, 1],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}
_EOS = 49407


def initial_params(unet: UNet2DConditionModel) -> dict:
    """Random weights; every residual branch begins at zero, and the network as x0 = 0.

    The first 48 channels carry z and -z along the outermost skip to the last norm, where
    silu(z) - silu(-z) = z: where there is little noise, x0 is nearly z.
    """
    config = unet.config
    channels = config.in_channels
    params = unet.init(
        jax.random.key(0),
        jnp.zeros((1, 8, 8, channels)),
        jnp.zeros((1,), jnp.int32),
        jnp.zeros((1, 77, config.cross_attention_dim)),
        jnp.zeros((1, config.projection_class_embeddings_input_dim - 48)),
        jnp.zeros((1, 6)),
    )["params"]

    def zero_branches(path: tuple, leaf: jax.Array) -> np.ndarray:
        layer = path[-2].key
        last = layer in ("conv2", "proj_out", "conv_out")
        return np.zeros_like(leaf) if last else np.array(leaf)

    params = jax.tree_util.tree_map_with_path(zero_branches, params)
    width = config.block_out_channels[0]
    shortcut = params["up_blocks.1"]["resnets.1"]["conv_shortcut"]["kernel"]
    shortcut[:, :, :, : 2 * channels] = 0
    params["conv_in"]["kernel"][..., : 2 * channels] = 0
    for channel in range(2 * channels):
        sign = 1 if channel < channels else -1
        params["conv_in"]["kernel"][1, 1, channel % channels, channel] = sign
        shortcut[0, 0, width + channel, channel] = 1
    return params


def towers(folder: Path) -> list[tuple[CLIPTextModel, dict]]:
    """Both text towers with their weights, fp32."""
    found = []
    for name in ("text_encoder", "text_encoder_2"):
        raw = json.loads((folder / name / "config.json").read_text())
        tower = CLIPTextModel(CLIPTextConfig.from_dict(raw))
        shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))
        found.append((tower, read_weights(folder / name / "model.safetensors", shapes["params"])))
    return found


def read_weights(path: Path, shapes: dict) -> dict:
    """A file's tensors as parameters of `shapes`' structure, fp32."""
    tensors = load_file(path)
    flat = flax.traverse_util.flatten_dict(shapes)
    read = {k: names.to_flax_layout(k, tensors[names.torch_key(k)]) for k in flat}
    return flax.traverse_util.unflatten_dict({k: v.astype(np.float32) for k, v in read.items()})


def batches(data: dict[str, np.ndarray], size: int, scaling_factor: float) -> Iterator[dict]:
    """Endless epochs in random order, each picture with one of its wordings."""
    rng = np.random.default_rng()
    count, wordings = data["ids"].shape[:2]
    order = np.empty(0, int)
    while True:
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        rows, order = np.sort(order[:size]), order[size:]
        yield dict(
            latents=data["latents"][rows].astype(np.float32) * np.float32(scaling_factor),
            ids=data["ids"][rows, rng.integers(wordings, size=size)].astype(np.int32),
        )


def time_distribution(process: DiscreteVP) -> np.ndarray:
    """Cumulative shares of the times 0 to 999: half uniform, half uniform in log r for r in 0.1..3.

    There shapes and edges are decided; uniform times alone give r < 0.3 a tenth of the samples.
    """
    t = np.arange(1000)
    log_r = np.log(np.asarray(process.sigma(t)) / np.asarray(process.alpha(t)))
    inside = (log_r > np.log(0.1)) & (log_r < np.log(3))
    slope = np.gradient(log_r) * inside
    return np.cumsum(0.5 / len(t) + 0.5 * slope / slope.sum())


def muon(schedule: optax.Schedule, params: dict) -> optax.GradientTransformation:
    """Muon on every matrix and convolution but the first and last layer; Adam on the rest."""

    def dimensions(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if path[0].key in ("conv_in", "conv_out") or leaf.ndim < 2:
            return None
        inputs = tuple(range(leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, (leaf.ndim - 1,))

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            weight_decay=0.02,
            adam_b2=0.99,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(dimensions, params),
        ),
    )


def main() -> None:
    """Trains the UNet; writes its averaged weights every `--save-every` steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, required=True, help="what miniature.shapes.cache wrote"
    )
    parser.add_argument("--output", type=Path, required=True, help="the pipeline folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="vocab.json, merges.txt")
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints")
    parser.add_argument("--scaling-factor", type=float, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.25, help="last share, falling to zero")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--init", type=Path, help="unet weights of another run")
    parser.add_argument(
        "--new-output", action="store_true", help="of --init: the last layer begins at zero"
    )
    args = parser.parse_args()

    complete_folder(args.output, args.tokenizer, CONFIG, "sample")
    unet = UNet2DConditionModel(UNetConfig.from_dict(CONFIG))
    params = initial_params(unet)
    print(f"UNet: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters", flush=True)
    if args.init:
        params = read_weights(args.init, params)
    if args.new_output:
        params["conv_out"] = jax.tree.map(np.zeros_like, params["conv_out"])
    data = cache.load(args.cache)
    scale = args.scaling_factor
    mean = data["latents"][:5000].astype(np.float32).mean((0, 1, 2))
    deviation = scale * float(np.std(data["latents"][:5000].astype(np.float32) - mean))
    print(f"{len(data['ids'])} scenes, scaled latents' deviation {deviation:.4f}", flush=True)
    (first, first_params), (second, second_params) = towers(args.output)
    process = process_from_config({**SCHEDULER, "prediction_type": "sample"})

    cumulative = jnp.asarray(time_distribution(process))

    def condition(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        # After the caption's end the second tokenizer pads with 0.
        after = jnp.cumsum(ids == _EOS, axis=1) > 1
        states = first.apply({"params": first_params}, ids)[0][-2]
        others = jnp.where(after, 0, ids)
        second_states, _, pooled = second.apply({"params": second_params}, others)
        return jnp.concatenate([states, second_states[-2]], axis=-1), pooled

    def loss_fn(params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        x0 = batch["latents"]
        size = x0.shape[0]
        time_key, order_key, noise_key, drop_key = jax.random.split(key, 4)
        # One time a stratum: the loss of a batch varies less.
        share = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) / size
        t = jax.random.permutation(order_key, jnp.searchsorted(cumulative, share))
        noise = jax.random.normal(noise_key, x0.shape)
        keep = jax.random.bernoulli(drop_key, 0.9, (size,)).astype(jnp.float32)
        states, pooled = condition(batch["ids"])
        side = 8.0 * x0.shape[1]
        time_ids = jnp.broadcast_to(jnp.array([[side, side, 0, 0, side, side]]), (size, 6))
        alpha, sigma = process.alpha(t), process.sigma(t)
        x0_hat = unet.apply(
            {"params": params}, process.add_noise(x0, noise, t), t,
            states * keep[:, None, None], pooled * keep[:, None], time_ids,
        )  # fmt: skip
        ratio = sigma / alpha
        error = mse(x0_hat, x0) * (1 / ratio**2 + 1 / deviation**2)  # equation (1)
        loss = jnp.mean(error / (1 + (ratio / 5) ** 2))
        bands = ((0, 0.3), (0.3, 1), (1, 3), (3, 99))
        within = [(ratio >= low) & (ratio < high) for low, high in bands]
        shown = {
            f"noise<{high}": jnp.sum(error * hit) / jnp.sum(hit)
            for hit, (_, high) in zip(within, bands, strict=True)
        }
        return loss, shown

    rate = trapezoid(args.learning_rate, args.steps, warmup=100, decay=args.decay)
    params = fit(
        loss_fn,
        params,
        batches(data, args.batch, scale),
        steps=args.steps,
        learning_rate=rate,
        optimizer=muon(rate, params),
        workdir=args.workdir,
        ema_decay=0.998,
        log_every=50,
        save_every=args.save_every,
        report=lambda step, ema: save_unet(ema, args.output),
    )
    save_unet(params, args.output)


if __name__ == "__main__":
    main()
