"""A closed-form world to distil in: a Gaussian teacher, and an affine student that starts as it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.noise import PROCESSES
from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.process import Process, bcast_right
from tlcm_jax.diffusion.timesteps import milestones
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.terms.compose import StageLoss


def keys(seed, count):
    """A key for each of `count` samples."""
    return jax.random.split(jax.random.key(seed), count)


class World:
    """Gaussian data under guidance, whose flow is known, and networks over it.

    The frozen tree holds the null Gaussian and a scale, 1, of the teacher's x0, so that a gradient
    in it tells that the teacher was followed. The trainable parameters are the student's
    correction to the unguided teacher, zero at the start, as with LoRA's B.
    """

    scale = 2.0
    segments = 8
    knots = 9

    def __init__(self, process: Process, shape: tuple[int, ...]):
        self.process, self.shape = process, shape
        mean = np.array([0.9, -0.6, 0.3, -0.2], np.float32).reshape(shape)
        variance = np.array([0.02, 0.1, 0.4, 1.0], np.float32).reshape(shape)
        self.variance, self.mean = jnp.asarray(variance), jnp.asarray(mean)
        null = Gaussian(jnp.full((1, *shape), 0.1), self.variance[None])
        self.frozen = {"null": null, "scale": jnp.ones(())}
        self.networks = Networks(
            process=process,
            latent_shape=shape,
            student=self.student,
            teacher=self.teacher,
            null_of=lambda frozen: lambda conditioning: frozen["null"],
        )

    def conditioning(self, batch):
        """One and the same conditional Gaussian for each sample."""
        return Gaussian(*(jnp.repeat(leaf[None], batch, 0) for leaf in (self.mean, self.variance)))

    def different(self, batch):
        """Conditional Gaussians of different means."""
        shift = bcast_right(jnp.arange(float(batch)), jnp.zeros((batch, *self.shape)))
        data = self.conditioning(batch)
        return data._replace(mean=data.mean + 0.3 * shift)

    def guided(self, batch):
        """The Gaussian that the guided teacher samples."""
        null = Gaussian(*(jnp.repeat(leaf, batch, axis=0) for leaf in self.frozen["null"]))
        return gaussian.extrapolate(null, self.conditioning(batch), self.scale)

    def marginal(self, key, t):
        """Latents at times t of the guided teacher's trajectories."""
        data = self.guided(len(t))
        spread = jnp.sqrt(gaussian.variance_at(self.process, data, t))
        noise = jax.random.normal(key, spread.shape)
        return bcast_right(self.process.alpha(t), noise) * data.mean + spread * noise

    def latents(self, key, batch):
        """Real ones: samples of the conditional Gaussian."""
        data = self.conditioning(batch)
        return data.mean + jnp.sqrt(data.variance) * jax.random.normal(key, data.mean.shape)

    def batch(self, size):
        """A batch of prompts as every objective takes it."""
        return {
            "conditioning": self.conditioning(size),
            "latents": self.latents(jax.random.key(9), size),
        }

    def pairs(self, objective, size, seed=0, batch=None, trainable=None):
        """What an objective makes of `size` prompts."""
        arguments = (
            self.trainable() if trainable is None else trainable,
            self.frozen,
            self.batch(size) if batch is None else batch,
            keys(seed, size),
        )
        return jax.jit(objective.sample_pairs)(*arguments)

    def loss(self, objective, pairs, trainable=None, others=None):
        """The consistency loss of each pair, and its metrics."""
        arguments = (trainable or {}, self.frozen, pairs, keys(0, len(pairs.z_m)), others or {})
        return jax.jit(StageLoss(objective).__call__)(*arguments)

    def trainable(self):
        """No correction: the student is the teacher."""
        zeros = jnp.zeros((self.segments, self.knots, *self.shape))
        return {"gain": zeros, "bias": zeros}

    def teacher(self, frozen):
        """Without guidance."""
        denoiser = gaussian.denoiser(self.process)
        return lambda z, t, conditioning: frozen["scale"] * denoiser(z, t, conditioning)

    def student(self, trainable, frozen):
        """x0 = teacher's x0 + gain * whitened z + bias; both piecewise linear in t, by segment."""
        del frozen
        teacher = gaussian.denoiser(self.process)
        ascending = jnp.asarray(milestones(self.process, self.segments)[::-1])

        def at(table, t):
            segment = jnp.searchsorted(ascending, t, method="compare_all") - 1
            low, high = ascending[segment], ascending[segment + 1]
            place = (t - low) / (high - low) * (self.knots - 1)
            left = jnp.clip(jnp.floor(place), 0, self.knots - 2).astype(jnp.int32)
            share = bcast_right(place - left, table[0, left])
            return (1 - share) * table[segment, left] + share * table[segment, left + 1]

        def denoise(z, t, conditioning):
            alpha = bcast_right(self.process.alpha(t), z)
            spread = jnp.sqrt(gaussian.variance_at(self.process, conditioning, t))
            whitened = (z - alpha * conditioning.mean) / spread
            correction = at(trainable["gain"], t) * whitened + at(trainable["bias"], t)
            return teacher(z, t, conditioning) + correction

        return denoise


@functools.cache
def world_of(kind: str, rank: int) -> World:
    """The world of a process in `tests.support.noise.PROCESSES`, its latents of rank 1 or 3."""
    return World(PROCESSES[kind], {1: (4,), 3: (2, 2, 1)}[rank])


def constant_student(value):
    """A student that sees the same x0 everywhere."""
    return lambda trainable, frozen: lambda z, t, conditioning: jnp.full_like(z, value)
