"""The scorers there are, by name. A new one is one file beside this one and one line in `SCORERS`.

A dotted name is a plug-in: a module that can be imported and offers `load(path)`, such as
`miniature.judge`. It returns a `Scorer`, or a plain function of images and prompts (function.py).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from tlcm_jax.evaluation.scorers import (
    aesthetic,
    clip,
    feature_distance,
    hps,
    image_reward,
    mps,
    pickscore,
)
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.evaluation.scorers.function import FunctionScorer, check_callable

# Name -> loader, given the file or folder of the weights; "" where none was given.
SCORERS: Mapping[str, Callable[[str], Scorer]] = {
    **clip.LOADERS,
    **aesthetic.LOADERS,
    **feature_distance.LOADERS,
    **hps.LOADERS,
    "image_reward": image_reward.load,
    "mps": mps.load,
    "pickscore": pickscore.load,
}


def load_scorer(name: str, path: str = "", *, differentiable: bool = False) -> Scorer:
    """Loads a scorer.

    Args:
      name: a key of `SCORERS`, or the dotted name of a module that offers `load(path)`.
      path: the file or folder of its weights; "" leaves it to the scorer, which may know a place.
      differentiable: whether its gradient will be followed, and so must be there.

    Raises:
      ValueError: an unknown name, or no gradient.
      FileNotFoundError: weights are missing.
    """
    scorer = _loader(name)(path)
    if not isinstance(scorer, Scorer):
        scorer = FunctionScorer(name.rpartition(".")[2], check_callable(name, scorer))
    if not differentiable:
        return scorer
    if not scorer.differentiable:
        raise ValueError(
            f"scorer {name!r} has no gradient in the images, so preference cannot follow it; a "
            "`reward` term can"
        )
    if "." in name:  # the library's own are tested; a plug-in's claim is tried
        check_gradient(name, scorer)
    return scorer


def load_scorers(named: Sequence[str]) -> tuple[Scorer, ...]:
    """Loads scorers given as `NAME` or `NAME=PATH`.

    Raises:
      ValueError: an unknown name, or one twice.
      FileNotFoundError: weights are missing.
    """
    pairs = [(name, path) for name, _, path in (each.partition("=") for each in named)]
    names = [name for name, _ in pairs]
    for name in names:  # all names before any weights are read
        _loader(name)
    if len(set(names)) < len(names):
        raise ValueError(f"scorers {', '.join(names)}: name each once")
    return tuple(load_scorer(name, path) for name, path in pairs)


def _loader(name: str) -> Callable[[str], Scorer]:
    known = f"known: {', '.join(SCORERS) or 'none'}, or a module with `load(path)`, dotted"
    if "." not in name:
        if name not in SCORERS:
            raise ValueError(f"unknown scorer {name!r}; {known}")
        return SCORERS[name]
    try:
        return importlib.import_module(name).load
    except ModuleNotFoundError as error:
        raise ValueError(f"scorer {name!r}: {error}; {known}") from None
    except AttributeError:
        raise ValueError(f"scorer {name!r}: that module has no `load`; {known}") from None


def check_gradient(name: str, scorer: Scorer) -> None:
    """Tries a scorer on a grey image with a little noise.

    Raises:
      ValueError: it cannot be differentiated, or its gradient in the image is 0.
    """
    images = 0.5 + 0.1 * jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
    texts = scorer.texts(["an image"])

    def total(images: Array) -> Array:
        return jnp.sum(scorer.score(scorer.params, images, texts))

    try:
        gradient = jax.grad(total)(images)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scorer {name!r} cannot be differentiated: {error}") from None
    if not bool(jnp.any(gradient != 0)):
        raise ValueError(
            f"scorer {name!r} says it is differentiable, and its gradient in the image is 0: set "
            "`differentiable` to False"
        )
