"""A closed-form world to distil in: a Gaussian teacher, and an affine student that starts as it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion import trajectories as paths
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.process import NoiseSchedule
from tlcm_jax.distillation.networks import Networks

SHAPE = (2, 2, 1)


class World:
    """Gaussian data under guidance, whose flow is known, and networks over it.

    The frozen parameters are the null Gaussian; the trainable ones the student's correction to
    the unguided teacher, zero at the start, as with LoRA's B.
    """

    shape = SHAPE
    scale = 2.0
    segments = 8
    knots = 9

    def __init__(self):
        betas = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.schedule = NoiseSchedule.from_config(betas)
        mean = np.array([0.9, -0.6, 0.3, -0.2], np.float32).reshape(SHAPE)
        variance = np.array([0.02, 0.1, 0.4, 1.0], np.float32).reshape(SHAPE)
        self.variance = jnp.asarray(variance)
        self.mean = jnp.asarray(mean)
        self.frozen = Gaussian(jnp.full((1, *SHAPE), 0.1), self.variance[None])
        self.networks = Networks(
            student=self.student,
            teacher=lambda frozen: gaussian.denoiser(self.schedule),
            null=lambda frozen: frozen,
        )

    def conditioning(self, batch):
        """One and the same conditional Gaussian for each sample."""
        return Gaussian(
            jnp.tile(self.mean, (batch, 1, 1, 1)), jnp.tile(self.variance, (batch, 1, 1, 1))
        )

    def guided(self, batch):
        """The Gaussian that the guided teacher samples."""
        null = Gaussian(*(jnp.tile(leaf, (batch, 1, 1, 1)) for leaf in self.frozen))
        return gaussian.extrapolate(null, self.conditioning(batch), self.scale)

    def marginal(self, key, t):
        """Latents at times t of the guided teacher's trajectories."""
        data = self.guided(len(t))
        spread = jnp.sqrt(gaussian.variance_at(self.schedule, data, t))
        noise = jax.random.normal(key, spread.shape)
        return self.schedule.alpha(t) * data.mean + spread * noise

    def latents(self, key, batch):
        """Real ones: samples of the conditional Gaussian."""
        data = self.conditioning(batch)
        return data.mean + jnp.sqrt(data.variance) * jax.random.normal(key, data.mean.shape)

    def trainable(self):
        """No correction: the student is the teacher."""
        zeros = jnp.zeros((self.segments, self.knots, *SHAPE))
        return {"gain": zeros, "bias": zeros}

    def student(self, trainable, frozen):
        """x0 = teacher's x0 + gain * whitened z + bias; both piecewise linear in t, by segment."""
        del frozen
        teacher = gaussian.denoiser(self.schedule)
        train_steps = self.schedule.train_steps
        ascending = jnp.asarray(paths.milestones(self.segments, train_steps)[::-1])

        def at(table, t):
            segment = jnp.searchsorted(ascending, t, side="left") - 1
            low, high = ascending[segment], ascending[segment + 1]
            place = (t - low) / (high - low) * (self.knots - 1)
            left = jnp.clip(jnp.floor(place), 0, self.knots - 2).astype(jnp.int32)
            share = (place - left)[:, None, None, None]
            return (1 - share) * table[segment, left] + share * table[segment, left + 1]

        def denoise(z, t, conditioning):
            alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
            spread = jnp.sqrt(gaussian.variance_at(self.schedule, conditioning, t))
            whitened = (z - alpha * conditioning.mean) / spread
            correction = at(trainable["gain"], t) * whitened + at(trainable["bias"], t)
            return teacher(z, t, conditioning) - alpha / sigma * correction

        return denoise


@pytest.fixture(scope="session")
def world():
    return World()
