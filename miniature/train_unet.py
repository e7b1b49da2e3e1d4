"""Trains the miniature's UNet on the latents of the emoji, and completes the pipeline folder.

    python -m miniature.train_unet --data emoji32.npz --output miniature/emoji-xl --tokenizer DIR

Epsilon prediction with min-SNR weighting (Hang et al., arXiv 2303.09556; gamma 5), an averaged
network, and the null conditioning (zeros, as SDXL has it) in a tenth of the samples.
"""

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from miniature.teacher_folder import complete_folder, save_unet
from tlcm_jax.diffusion.sampling import sample_teacher
from tlcm_jax.families.base import abstract_params
from tlcm_jax.families.load import load_model
from tlcm_jax.families.stable_diffusion import StableDiffusion
from tlcm_jax.models.conditioning import Conditioning
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.training.fit import fit, trapezoid

CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": [5, 6, 7],
    "block_out_channels": [80, 96, 112],
    "center_input_sample": False,
    "cross_attention_dim": 96,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 16,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 112,
    "sample_size": 8,
    "transformer_layers_per_block": [1, 1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


def encode_dataset(
    pipeline: StableDiffusion, data: dict, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Latents `[n, 8, 8, 4]` and, for each caption, text states and pooled embeddings."""
    encode = jax.jit(pipeline.encode_images)
    images = data["images"][rows]
    latents = [encode(images[i : i + 64] / np.float32(255)) for i in range(0, len(images), 64)]
    captions = data["captions"][rows]
    flat = captions.reshape(-1).tolist()
    flat += [flat[-1]] * (-len(flat) % 256)  # whole batches: one compilation
    texts = [pipeline.encode(flat[i : i + 256]) for i in range(0, len(flat), 256)]

    def gather(leaves: list) -> np.ndarray:
        joined = np.concatenate([np.asarray(leaf, np.float16) for leaf in leaves])
        return joined[: captions.size].reshape(*captions.shape, *joined.shape[1:])

    return dict(
        latents=np.concatenate(latents),
        prompt_embeds=gather([text.prompt_embeds for text in texts]),
        pooled=gather([text.pooled for text in texts]),
    )


def batches(encoded: dict[str, np.ndarray], size: int, seed: int) -> Iterator[dict]:
    """Endless epochs in random order, each picture with one of its captions."""
    rng = np.random.default_rng(seed)
    count, captions = encoded["pooled"].shape[:2]
    order = np.empty(0, int)
    while True:
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        rows, order = order[:size], order[size:]
        which = rng.integers(captions, size=size)
        yield dict(
            latents=encoded["latents"][rows],
            prompt_embeds=encoded["prompt_embeds"][rows, which].astype(np.float32),
            pooled=encoded["pooled"][rows, which].astype(np.float32),
        )


def main() -> None:
    """Trains the UNet; leaves samples beside its checkpoints every `--save-every` steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="emoji32.npz")
    parser.add_argument("--output", type=Path, required=True, help="the pipeline folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="vocab.json, merges.txt")
    parser.add_argument("--workdir", type=Path, default=Path("runs/miniature-unet"))
    parser.add_argument("--steps", type=int, default=8500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()

    complete_folder(args.output, args.tokenizer, CONFIG, "epsilon")
    unet = UNet2DConditionModel(UNetConfig.from_dict(CONFIG))
    shapes = abstract_params(unet)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    print(f"UNet: {count:,} parameters")
    params = initial_params(unet)
    if not (args.output / "unet" / "diffusion_pytorch_model.safetensors").exists():
        save_unet(params, args.output)
    pipeline = load_model(args.output)
    data = np.load(args.data)
    encoded = encode_dataset(pipeline, data, np.flatnonzero(~data["composition"]))
    print(f"latents: deviation {encoded['latents'].std():.3f}", flush=True)
    process = pipeline.process
    time_ids = jnp.array([[32.0, 32, 0, 0, 32, 32]])

    def loss_fn(params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        size = batch["latents"].shape[0]
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        # One time a stratum: the loss of a batch varies less.
        t = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) * 1000 / size
        t = t.astype(jnp.int32)
        noise = jax.random.normal(noise_key, batch["latents"].shape)
        keep = jax.random.bernoulli(drop_key, 0.9, (size,)).astype(jnp.float32)
        conditioning = Conditioning(
            prompt_embeds=batch["prompt_embeds"] * keep[:, None, None],
            pooled=batch["pooled"] * keep[:, None],
            time_ids=jnp.broadcast_to(time_ids, (size, 6)),
        )
        z = process.add_noise(batch["latents"], noise, t)
        eps = pipeline.predict(params, z, t, conditioning)
        error = jnp.mean((eps - noise) ** 2, axis=(1, 2, 3))
        snr = process.snr(t)
        return jnp.mean(error * jnp.minimum(snr, 5.0) / snr), dict(eps_mse=jnp.mean(error))

    report = sample_reporter(pipeline, args.workdir)
    params = fit(
        loss_fn,
        params,
        batches(encoded, args.batch, seed=0),
        steps=args.steps,
        learning_rate=trapezoid(args.learning_rate, args.steps, decay=0.3),
        workdir=args.workdir / "checkpoints",
        ema_decay=0.998,
        save_every=args.save_every,
        report=lambda step, ema: (save_unet(ema, args.output), report(step, ema)),
    )
    save_unet(params, args.output)


def initial_params(unet: UNet2DConditionModel) -> dict:
    """Random weights, with the last convolution zero."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    params = unet.init(
        jax.random.key(0),
        jnp.zeros((1, 8, 8, 4)),
        jnp.zeros((1,), jnp.int32),
        jnp.zeros((1, 77, config.cross_attention_dim)),
        jnp.zeros((1, pooled)),
        jnp.zeros((1, 6)),
    )["params"]
    params["conv_out"] = jax.tree.map(jnp.zeros_like, params["conv_out"])
    return params


def sample_reporter(pipeline: StableDiffusion, folder: Path):
    """A function `(step, params)` that draws a sheet of pictures with the guided teacher."""
    objects = ("red apple", "cat face", "rocket", "sunflower", "fire engine", "grinning face",
               "octopus", "guitar")  # fmt: skip
    styles = ("a 3D render of a {}", "a Noto emoji of a {}", "a flat icon of a {}",
              "a Twemoji sticker of a {}")  # fmt: skip
    prompts = [style.format(name) for style in styles for name in objects]
    conditioning = pipeline.encode(prompts)
    null = pipeline.null_conditioning()
    noise = jax.random.normal(jax.random.key(1), (len(prompts), *pipeline.latent_shape()))

    @jax.jit
    def draw(params: dict) -> jax.Array:
        return sample_teacher(
            pipeline.denoiser(params),
            pipeline.process,
            noise,
            conditioning,
            functools.partial(pipeline.null_of, null),
            scale=4.0,
        )

    def report(step: int, params: dict) -> None:
        images = np.asarray(pipeline.decode(draw(params)))
        rows, side = len(styles), images.shape[1]
        sheet = images.reshape(rows, -1, side, side, 3).transpose(0, 2, 1, 3, 4)
        sheet = Image.fromarray((255 * sheet.reshape(rows * side, -1, 3)).astype(np.uint8))
        sheet = sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.BICUBIC)
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"samples-{step}.png")

    return report


if __name__ == "__main__":
    main()
