"""Stable Diffusion's noise schedule, and random latents at random times."""

from typing import NamedTuple

import jax
import pytest

from tlcm_jax.diffusion.process import NoiseSchedule


@pytest.fixture(scope="session")
def schedule():
    return NoiseSchedule.from_config(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    )


class Latents(NamedTuple):
    z: jax.Array
    x0: jax.Array
    t: jax.Array
    s: jax.Array


@pytest.fixture(scope="session")
def latents():
    """A batch of 32, with s < t."""
    z_key, x0_key, t_key, s_key = jax.random.split(jax.random.key(0), 4)
    shape = (32, 4, 4, 3)
    return Latents(
        z=jax.random.normal(z_key, shape),
        x0=jax.random.normal(x0_key, shape),
        t=jax.random.randint(t_key, (32,), 500, 1000),
        s=jax.random.randint(s_key, (32,), 0, 500),
    )
