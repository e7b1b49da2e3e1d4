"""The library's small training loop, under the name that the miniature's scripts know it by."""

from tlcm_jax.training.fit import cosine, fit, trapezoid

__all__ = ["cosine", "fit", "trapezoid"]
