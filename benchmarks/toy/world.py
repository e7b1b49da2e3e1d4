"""The toy: a class-conditional mixture in the plane, and a teacher that was trained on it.

Class c of four has two Gaussians of deviation 0.25, their eight means evenly on a circle of radius
1.2, so that classes overlap: guidance has something to do, and the guided flow is curved. The
teacher is an MLP that predicts epsilon from (z, t, c), trained by
the usual loss on Stable Diffusion's schedule, the class left out one time in ten.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.guidance import Denoiser
from tlcm_jax.diffusion.process import Process
from tlcm_jax.diffusion.scheduler_config import process_from_config
from tlcm_jax.distillation.networks import Networks

CLASSES, NULL = 4, 4
DEVIATION, RADIUS = 0.25, 1.2
SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


class Network(nn.Module):
    """Epsilon of points `[b, 2]` at times `[b]`, of classes `[b]`."""

    width: int = 64
    depth: int = 2

    @nn.compact
    def __call__(
        self, z: Float[Array, "b 2"], t: Int[Array, " b"], c: Int[Array, " b"]
    ) -> Float[Array, "b 2"]:
        """See the class."""
        angles = (t[:, None] / 1000) * 2.0 ** np.arange(6)
        x = jnp.concatenate([z, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        x = nn.Dense(self.width)(x) + nn.Embed(CLASSES + 1, self.width)(c)
        for _ in range(self.depth):
            x = x + nn.Dense(self.width)(nn.silu(nn.Dense(self.width)(nn.silu(x))))
        return nn.Dense(2)(nn.silu(x))


NETWORK = Network()


def process() -> Process:
    """Stable Diffusion's."""
    return process_from_config(SCHEDULE)


def draw(key: PRNGKeyArray, c: Int[Array, " b"]) -> Float[Array, "b 2"]:
    """Points of classes c."""
    which_key, noise_key = jax.random.split(key)
    which = jax.random.bernoulli(which_key, shape=c.shape)
    angle = 2 * jnp.pi * (2 * c + which) / (2 * CLASSES)
    means = RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return means + DEVIATION * jax.random.normal(noise_key, (*c.shape, 2))


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def train_teacher(key: PRNGKeyArray, steps: int = 4000, batch: int = 256) -> PyTree[Array]:
    """The teacher's parameters."""
    schedule = process()
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    blank = jnp.zeros((1,), jnp.int32)
    first = NETWORK.init(key, jnp.zeros((1, 2)), blank, blank)["params"]

    def update(carry: PyTree[Array], step: Array) -> tuple[PyTree[Array], None]:
        params, moments = carry
        keys = jax.random.split(jax.random.fold_in(key, step), 5)
        c = jax.random.randint(keys[0], (batch,), 0, CLASSES)
        x0, noise = draw(keys[1], c), jax.random.normal(keys[2], (batch, 2))
        t = jax.random.randint(keys[3], (batch,), 0, schedule.num_train_timesteps)
        c = jnp.where(jax.random.bernoulli(keys[4], 0.1, c.shape), NULL, c)
        z = schedule.add_noise(x0, noise, t)

        def loss(params: PyTree[Array]) -> Array:
            return jnp.mean(jnp.square(NETWORK.apply({"params": params}, z, t, c) - noise))

        changes, moments = optimizer.update(jax.grad(loss)(params), moments)
        return (optax.apply_updates(params, changes), moments), None

    carry, _ = jax.lax.scan(update, (first, optimizer.init(first)), jnp.arange(steps))
    return carry[0]


def denoiser(params: PyTree[Array]) -> Denoiser:
    """The network as the library sees one: `(z, t, c) -> x0`."""
    schedule = process()

    def denoise(
        z: Float[Array, "b 2"], t: Int[Array, " b"], c: Int[Array, " b"]
    ) -> Float[Array, "b 2"]:
        return schedule.to_x0(NETWORK.apply({"params": params}, z, t, c), z, t)

    return denoise


def networks() -> Networks:
    """Teacher and student, each the network with parameters of its own."""
    return Networks(
        process=process(),
        latent_shape=(2,),
        student=lambda trainable, frozen: denoiser(trainable),
        teacher=lambda frozen: denoiser(frozen["teacher"]),
        null_of=lambda frozen: lambda c: jnp.full_like(c, NULL),
    )


def follow(
    step: Denoiser, z: Float[Array, "b 2"], c: Int[Array, " b"], times: tuple[int, ...]
) -> Float[Array, "b 2"]:
    """Deterministic steps along falling times, by the x0 of `step` at each but the last."""
    schedule = process()

    def advance(z: Array, pair: Array) -> tuple[Array, None]:
        t, s = (jnp.full(z.shape[:1], time) for time in pair)
        return schedule.step(z, step(z, t, c), t, s), None

    pairs = jnp.asarray(list(zip(times[:-1], times[1:], strict=True)))
    return jax.lax.scan(advance, z, pairs)[0]


def spread(x: Float[Array, "b 2"]) -> float:
    """Root mean square of the length of differences `[b, 2]`."""
    return float(jnp.sqrt(jnp.mean(jnp.sum(jnp.square(x), axis=-1))))
