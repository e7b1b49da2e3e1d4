"""Trains the scorer of the world of shapes, which preference can follow.

    python -m miniature.shapes.train_scorer --output miniature/shapes/contrastive

Fresh renders against captions: with t and b learnt, y_ij = 1 where picture i answers caption j and
-1 where it does not,

    L = mean of softplus(-y_ij (t cos(u_i, v_j) + b)),                              (1)

the pairwise loss of SigLIP (arXiv 2303.15343), the means over y = 1, over other pictures' captions
and over captions with one thing wrong counting alike. What answers what is known from what was
drawn. Pictures are softened and roughened as decoders do; one in eight is half another picture,
and answers nothing. Prints how well the score tells right captions from such with one thing wrong.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from miniature.contrastive import ContrastiveNetwork, initial_shapes, words
from miniature.shapes import parser as judge
from miniature.shapes.captions import WORDINGS, english
from miniature.shapes.contrastive import ShapesContrastive
from miniature.shapes.fresh import fresh, roughen
from miniature.shapes.render import render
from miniature.shapes.scene import (
    ATTRIBUTES,
    MAX_OBJECTS,
    RELATIONS,
    RUNGS,
    TEST_START,
    Rung,
    Spec,
    answered,
    draw_scene,
    draw_spec,
)
from miniature.shapes.scorer import parsed
from tlcm_jax.evaluation.scorers.base import image_scores
from tlcm_jax.families.load import load_model
from tlcm_jax.training.fit import cosine, fit

NETWORK = ContrastiveNetwork(
    widths=(16, 32, 64, 128), features=64, resolution=64, rows=2048, context=3
)
_SPOILED = 8  # one in so many pictures


def wrong(spec: Spec, rung: Rung, rng: np.random.Generator, what: str = "") -> Spec | None:
    """The spec with one thing that it names changed; None if it names no such thing.

    Args:
      spec: what is right.
      rung: whose values are taken.
      rng: of the choice.
      what: an attribute, "number" or "relation"; empty takes any of them.
    """
    many = any(name == "many" for name, _ in rung.layouts)
    named = [
        (i, name)
        for i, group in enumerate(spec.groups)
        for name in (*ATTRIBUTES, *(("number",) if many and not spec.relation else ()))
        if getattr(group, name)
    ] + ([(0, "relation")] if spec.relation else [])
    named = [each for each in named if what in ("", each[1])]
    if not named:
        return None
    i, name = named[rng.integers(len(named))]
    if name == "relation":
        others = [each for each in RELATIONS if each != spec.relation]
        return dataclasses.replace(spec, relation=others[rng.integers(len(others))])
    known = range(1, MAX_OBJECTS + 1) if name == "number" else rung.values(name)
    others = [each for each in known if each != getattr(spec.groups[i], name)]
    group = dataclasses.replace(spec.groups[i], **{name: others[rng.integers(len(others))]})
    groups = (*spec.groups[:i], group, *spec.groups[i + 1 :])
    return dataclasses.replace(spec, groups=groups)


def batches(first: int, size: int, rungs: Sequence[str]) -> Iterator[dict]:
    """Endless batches from a step on: n pictures, 2n captions, what answers what, `[n, 2n]`."""
    rng = np.random.default_rng([first, 1])
    for drawn in fresh(first, size, rungs):
        pictures, specs, scenes, indices = zip(*drawn, strict=True)
        spoilt = [
            wrong(spec, RUNGS[rungs[i % len(rungs)]], rng) or spec
            for spec, i in zip(specs, indices, strict=True)
        ]
        asked = [*specs, *spoilt]
        texts = [english(spec, int(rng.integers(WORDINGS))) for spec in asked]
        answers = [[answered(scene.things, spec) for spec in asked] for scene in scenes]
        yield dict(
            images=np.stack(pictures).astype(np.float32) / 255,
            words=words(texts, NETWORK.rows),
            answers=np.array(answers),
        )


def pairwise(network: ContrastiveNetwork) -> Callable:
    """`(params, batch, key) -> (loss, metrics)`: equation (1)."""

    def loss(params: dict, batch: dict, key: Array) -> tuple[Array, dict]:
        mixing, roughening = jax.random.split(key)
        n = len(batch["images"])
        spoiled = jnp.arange(n) % _SPOILED == 0
        share = jnp.where(spoiled, jax.random.uniform(mixing, (n,), minval=0.3, maxval=0.7), 0)
        share = share[:, None, None, None]
        images = batch["images"] * (1 - share) + jnp.roll(batch["images"], 1, axis=0) * share
        answers = batch["answers"] & ~spoiled[:, None]
        image, text = network.apply(
            {"params": params["network"]}, roughen(roughening, images), batch["words"]
        )
        logits = jnp.exp(jnp.minimum(params["scale"], jnp.log(50.0))) * (image @ text.T)
        logits = logits + params["bias"]
        each = jax.nn.softplus(jnp.where(answers, -logits, logits))
        own = jnp.eye(n, 2 * n, dtype=bool) | jnp.eye(n, 2 * n, n, dtype=bool)
        parts = {"right": answers, "other": ~answers & ~own, "near": ~answers & own}
        means = {
            name: jnp.sum(each * chosen) / jnp.maximum(jnp.sum(chosen), 1)
            for name, chosen in parts.items()
        }
        return sum(means.values()), means

    return loss


def area(right: Float[np.ndarray, " n"], others: Float[np.ndarray, " m"]) -> float:
    """Area under the ROC curve: how often a right one scores above one that is not."""
    ranks = np.searchsorted(np.sort(others), right, "left")
    ties = np.searchsorted(np.sort(others), right, "right")
    return float(np.mean(ranks + ties) / 2 / len(others))


def areas(
    scorer: ShapesContrastive, rung: Rung, count: int, through: Callable | None = None
) -> dict[str, float]:
    """How well the score tells what the parser finds right from what it does not.

    Args:
      scorer: to be measured.
      rung: of fresh test renders, `count` of them.
      count: see there; each is scored with its own caption and with ones that have one thing wrong.
      through: what becomes of the pictures, uint8, before they are scored; nothing by default.

    Returns:
      The area under the ROC curve by what is wrong, and of all of them together.
    """
    rng = np.random.default_rng(0)
    specs = [draw_spec(TEST_START + i, rung) for i in range(count)]
    images = np.stack([render(draw_scene(s, TEST_START + i, rung)) for i, s in enumerate(specs)])
    images = images if through is None else through(images)

    def scored(asked: Sequence[Spec], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        texts = [english(spec, int(rng.integers(WORDINGS))) for spec in asked]
        verdicts = [
            judge.satisfies(parsed(images[row], rung), spec)
            for row, spec in zip(rows, asked, strict=True)
        ]
        return image_scores(scorer, images[np.array(rows)], texts), np.array(verdicts)

    scores, verdicts = scored(specs, range(count))
    everything, found = [(scores, verdicts)], {}
    for name in (*ATTRIBUTES, "number", "relation"):
        changed = [(r, w) for r, s in enumerate(specs) if (w := wrong(s, rung, rng, name))]
        if changed:
            rows, asked = zip(*changed, strict=True)
            seen, said = scored(asked, rows)
            own = np.isin(np.arange(count), rows) & verdicts
            found[name] = area(scores[own], seen[~said])
            everything.append((seen, said))
    seen, said = (np.concatenate(part) for part in zip(*everything, strict=True))
    return {"all": area(seen[said], seen[~said]), **found}


def main() -> None:
    """Trains, reports and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes-scorer"))
    parser.add_argument("--rungs", nargs="+", default=["r1"], choices=RUNGS, help="in turn")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--count", type=int, default=1000, help="test renders")
    parser.add_argument("--model", type=Path, help="also through its autoencoder")
    args = parser.parse_args()

    shapes = initial_shapes(NETWORK)
    print(f"{sum(x.size for x in jax.tree.leaves(shapes))} parameters", flush=True)
    blank = jnp.zeros((1, 64, 64, 3))
    params = NETWORK.init(jax.random.key(0), blank, words(["a"], NETWORK.rows))["params"]
    trained = fit(
        pairwise(NETWORK),
        {"network": params, "scale": jnp.log(10.0), "bias": jnp.float32(-3.0)},
        lambda first: batches(first, args.batch, args.rungs),
        steps=args.steps,
        learning_rate=cosine(2e-3, args.steps),
        workdir=args.workdir,
        ema_decay=0.99,
        log_every=20,
        save_every=200,
    )["network"]

    scorer = ShapesContrastive(NETWORK, trained, 0.0)
    rung = RUNGS["r1"]
    specs = [draw_spec(TEST_START + i, rung) for i in range(args.count)]
    images = np.stack([render(draw_scene(s, TEST_START + i, rung)) for i, s in enumerate(specs)])
    # Good enough is what real pictures score with their own captions.
    own = float(np.mean(image_scores(scorer, images, [english(spec) for spec in specs])))
    scorer = dataclasses.replace(scorer, threshold=round(own, 1))
    scorer.save(args.output)
    scorer = ShapesContrastive.load(args.output)  # as it is stored, in fp16
    print(f"own captions score {scorer.threshold} on average")
    through: dict[str, Callable | None] = {"renders": None}
    if args.model:
        model = load_model(args.model)

        @jax.jit
        def decoded(images: Array) -> Array:
            return model.decode(model.encode_images(images / 255.0))

        def decode(images: np.ndarray) -> np.ndarray:
            cut = [decoded(images[i : i + 50]) for i in range(0, len(images), 50)]
            return np.round(255 * np.clip(np.concatenate(cut), 0, 1)).astype(np.uint8)

        through["through the autoencoder"] = decode
    for name in dict.fromkeys(args.rungs):
        for label, change in through.items():
            told = areas(scorer, RUNGS[name], args.count, change)
            shown = ", ".join(f"{what} {value:.4f}" for what, value in told.items())
            print(f"{name}, {label}: area under the ROC curve: {shown}", flush=True)


if __name__ == "__main__":
    main()
