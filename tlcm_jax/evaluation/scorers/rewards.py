"""Scorers that preference can follow: one interface, and the table of those there are.

A scorer for evaluation (`scorers.py`) gives numbers to a set of pictures; one here gives a number
to each picture and its text, differentiable in the picture. A new one is one file beside this
one, and one line in `REWARDS`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tlcm_jax.data.batches import whole_batches
from tlcm_jax.evaluation.scorers.contrastive import ContrastiveReward

PyTree = Any


class Reward(Protocol):
    """Scores pictures by how well they show texts."""

    @property
    def params(self) -> PyTree:
        """Its weights, on the host."""

    @property
    def threshold(self) -> float:
        """s0: the score of a picture that is good enough."""

    def texts(self, prompts: Sequence[str]) -> PyTree:
        """Prompts as `score` reads them: token ids or the like, numpy, `[n, ...]` each."""

    def score(self, params: PyTree, images: Array, texts: PyTree) -> Array:
        """Scores `[n]` of pictures `[n, h, w, 3]`, 0 to 1, of any size; traceable."""


# Name -> loader, given the folder that holds the scorer's weights.
REWARDS: Mapping[str, Callable[[str], Reward]] = {"contrastive": ContrastiveReward.load}


def load_reward(name: str, folder: str, *, followed: bool = True) -> Reward:
    """Loads a scorer.

    Args:
      name: a key of `REWARDS`.
      folder: its weights.
      followed: whether its gradient will be followed, and so must be there.

    Raises:
      ValueError: an unknown name, or no gradient.
      FileNotFoundError: weights are missing.
    """
    if name not in REWARDS:
        raise ValueError(f"unknown scorer {name!r}; known: {', '.join(REWARDS)}")
    reward = REWARDS[name](folder)
    if followed:
        check_gradient(name, reward)
    return reward


def check_gradient(name: str, reward: Reward) -> None:
    """Tries a scorer on a grey picture with a little noise.

    Raises:
      ValueError: it cannot be differentiated, or its gradient in the picture is 0.
    """
    images = 0.5 + 0.1 * jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
    texts = reward.texts(["a picture"])

    def total(images: Array) -> Array:
        return jnp.sum(reward.score(reward.params, images, texts))

    try:
        gradient = jax.grad(total)(images)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scorer {name!r} cannot be differentiated: {error}") from None
    if not bool(jnp.any(gradient != 0)):
        raise ValueError(
            f"scorer {name!r} has no gradient in the picture, so preference cannot follow it; it "
            "can be the judge"
        )


def mean_score(
    reward: Reward, pictures: np.ndarray, prompts: Sequence[str], batch: int = 50
) -> float:
    """The mean score of pictures with their own texts.

    Args:
      reward: the scorer.
      pictures: uint8 `[n, h, w, 3]`, n at least 1.
      prompts: n texts.
      batch: pictures at a time.
    """
    texts, score = reward.texts(prompts), jax.jit(reward.score)
    found = []
    for rows in whole_batches(len(pictures), batch):
        chosen = jax.tree.map(lambda x, rows=rows: x[rows], texts)
        scores = score(reward.params, pictures[rows].astype(np.float32) / 255, chosen)
        found.append(np.asarray(scores, np.float64))
    return float(np.concatenate(found)[: len(pictures)].mean())
