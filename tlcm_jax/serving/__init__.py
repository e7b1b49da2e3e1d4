"""A local page to draw on: what `python -m tlcm_jax.serve` runs."""
