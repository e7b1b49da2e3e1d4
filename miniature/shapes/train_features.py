"""Trains the small network whose features the Frechet distance of the world of shapes is of.

    python -m miniature.shapes.train_features --output miniature/shapes/features.safetensors

Of fresh renders of all rungs it tells, each by a yes or no, which shapes, colours, sizes, contrasts
and fills are there, how many objects, in which sixteenths of the picture, in which style and on
which ground; the loss is the cross entropy of these. Prints how many answers are right on tests.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from miniature.shapes.features import FeatureNetwork, initial_shapes, read_features, save
from miniature.shapes.fresh import fresh, roughen
from miniature.shapes.render import render
from miniature.shapes.scene import (
    ATTRIBUTES,
    GROUNDS,
    MAX_OBJECTS,
    RUNGS,
    SIDE,
    STYLES,
    TEST_START,
    Scene,
    draw_scene,
    draw_spec,
)
from tlcm_jax.training.fit import cosine, fit

_CELLS = 4  # along each side
_TAUGHT = ("r1", "r3", "full")


def questions(scene: Scene) -> Bool[np.ndarray, " answers"]:
    """The true answers of a scene, in a fixed order."""
    things = scene.things
    found = [
        any(getattr(thing, attribute) == value for thing in things)
        for attribute, values in ATTRIBUTES.items()
        for value in values
    ]
    found += [len(things) > n for n in range(1, MAX_OBJECTS)]
    cells = {(int(t.y * _CELLS / SIDE), int(t.x * _CELLS / SIDE)) for t in things}
    found += [(row, column) in cells for row in range(_CELLS) for column in range(_CELLS)]
    found += [scene.style == style for style in STYLES]
    found += [scene.ground == ground for ground in GROUNDS]
    return np.array(found)


def batches(first: int, size: int) -> Iterator[dict]:
    """Endless batches from a step on."""
    for drawn in fresh(first, size, _TAUGHT):
        images, _, scenes, _ = zip(*drawn, strict=True)
        yield dict(
            images=np.stack(images).astype(np.float32) / 255,
            answers=np.stack([questions(scene) for scene in scenes]),
        )


def answering(network: FeatureNetwork) -> Callable:
    """`(params, batch, key) -> (loss, metrics)`: the cross entropy of the answers."""

    def loss(params: dict, batch: dict, key: Array) -> tuple[Array, dict]:
        logits = network.apply({"params": params}, roughen(key, batch["images"]))[1]
        each = jax.nn.softplus(jnp.where(batch["answers"], -logits, logits))
        right = jnp.mean((logits > 0) == batch["answers"])
        return jnp.mean(jnp.sum(each, axis=1)), {"right": right}

    return loss


def main() -> None:
    """Trains, reports and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes-features"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--count", type=int, default=500, help="test renders of each rung")
    args = parser.parse_args()

    network = FeatureNetwork(answers=next(batches(0, 1))["answers"].shape[1])
    print(f"{sum(x.size for x in jax.tree.leaves(initial_shapes(network)))} parameters", flush=True)
    params = network.init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    trained = fit(
        answering(network), params, lambda first: batches(first, args.batch),
        steps=args.steps, learning_rate=cosine(2e-3, args.steps), workdir=args.workdir,
        ema_decay=0.99, log_every=20, save_every=100,
    )  # fmt: skip
    save(trained, args.output)
    for name in _TAUGHT:
        rung = RUNGS[name]
        scorer = read_features(args.output, rung)
        indices = range(TEST_START, TEST_START + args.count)
        scenes = [draw_scene(draw_spec(i, rung), i, rung) for i in indices]
        images = np.stack([render(scene) for scene in scenes]).astype(np.float32) / 255
        said = np.asarray(network.apply({"params": scorer.params}, images)[1]) > 0
        right = said == np.stack([questions(scene) for scene in scenes])
        print(f"{name}: {right.mean():.4f} of the answers, all of {right.all(1).mean():.3f}")


if __name__ == "__main__":
    main()
