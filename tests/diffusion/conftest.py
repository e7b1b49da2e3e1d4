"""Processes of both kinds, and random latents at random times."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from tests.support.noise import PROCESSES, times


@pytest.fixture(scope="session")
def sd():
    """Stable Diffusion's."""
    return PROCESSES["eps"]


@pytest.fixture(scope="session", params=["eps", "v-zero-snr", "flow-shift-3"])
def process(request):
    return PROCESSES[request.param]


@pytest.fixture(scope="session", params=[(), (4, 4, 3)], ids=str)
def shape(request):
    """Of one sample's latents, from a number to an image."""
    return request.param


class Latents(NamedTuple):
    z: jax.Array
    x0: jax.Array
    t: jax.Array
    s: jax.Array


@pytest.fixture(scope="session")
def latents(process, shape):
    """A batch of 32, with s < t; the first two t are the noisiest there is."""
    z_key, x0_key = jax.random.split(jax.random.key(0))
    rng = np.random.default_rng(0)
    t = rng.integers(500, 1000, 32)
    t[:2] = 999
    return Latents(
        z=jax.random.normal(z_key, (32, *shape)),
        x0=jax.random.normal(x0_key, (32, *shape)),
        t=times(process, t),
        s=times(process, rng.integers(1, 500, 32)),
    )
