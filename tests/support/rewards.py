"""A plug-in of plain functions: what a recipe's reward may name by `tests.support.rewards`."""

import numpy as np


def load(path):
    """`redder`: the share of pixels that are more red than green; it has no gradient."""
    if path != "redder":
        raise ValueError(f"scorer tests.support.rewards={path}: give 'redder'")
    return lambda images, prompts: np.mean(images[..., 0] > images[..., 1], axis=(1, 2))
