"""Roles beside student and teacher, over the closed-form Gaussian world of tests/distillation."""

import jax.numpy as jnp

from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.distillation.networks import Networks, Role, Scorer
from tlcm_jax.distillation.terms.compose import Made
from tlcm_jax.distillation.terms.preference import PreferenceSettings

WISH = PreferenceSettings(scorer="toy", weights="", judge="other")


def roles(world, count=lambda role, network: network, scale=None):
    """The world's roles, with a fake score, a discriminator, a decoder and scorers over it.

    `count` wraps networks by their role's name. With `scale` a frozen parameter of that name
    multiplies what every network but the student makes, so that its gradient tells who was asked.
    """
    schedule, base = world.schedule, world.networks

    def by(frozen):
        return 1.0 if scale is None else frozen["scale"]

    def fake(phi, frozen):
        def denoise(z, t, data):
            shifted = Gaussian(data.mean + phi["shift"], data.variance * jnp.exp(phi["spread"]))
            return by(frozen) * gaussian.eps(schedule, z, t, shifted)

        return count("fake", denoise)

    def discriminator(layers):
        def network(psi, frozen):
            def judge(z, t, conditioning):
                logits = jnp.sum(psi["w"] * z + psi["v"] * z**2, axis=(1, 2, 3)) + psi["b"]
                return (by(frozen) * logits[:, None, None, None],) * 2

            return count("discriminator", judge)

        zeros = {"w": jnp.zeros(world.shape), "v": jnp.zeros(world.shape), "b": jnp.zeros(())}
        return Role(initial=lambda key: zeros, network=network)

    def teacher(frozen):
        network = base.teacher(frozen)
        return count("teacher", lambda z, t, c: by(frozen) * network(z, t, c))

    def score(target):
        def compare(images, texts):
            return 10 - jnp.mean((images - target * texts[:, None, None, None]) ** 2, (1, 2, 3))

        return lambda frozen: lambda images, texts: by(frozen) * compare(images, texts)

    return Networks(
        student=lambda theta, frozen: count("student", world.student(theta, frozen)),
        teacher=teacher,
        null=(lambda frozen: frozen["null"]) if scale is not None else base.null,
        fake=Role(
            initial=lambda key: {
                "shift": jnp.zeros(world.shape),
                "spread": jnp.zeros(world.shape),
            },
            network=fake,
        ),
        discriminator=discriminator,
        decode=lambda frozen: lambda latents: by(frozen) * jnp.tanh(latents),
        reward=Scorer(score=score(1.0), threshold=9.9),
        judge=Scorer(score=score(-1.0), threshold=0.0),
        perceptual=lambda frozen: (
            lambda a, b: by(frozen) * jnp.mean(jnp.abs(jnp.sin(a) - jnp.sin(b)), axis=(1, 2, 3))
        ),
    )


def made_of(world, x0, sample=None, goal=None, level=0):
    """What critics and terms see of a student who predicts `x0`."""
    levels = jnp.full(len(x0), level)
    return Made(x0, x0, goal, sample, levels, world.conditioning(len(x0)))
