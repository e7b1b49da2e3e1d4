"""Terms, and the networks that they need, over the closed-form world of `gaussian_world`.

Every network but the student multiplies what it makes by the frozen scale or by a weight of its
own, so that a gradient in them tells that it was followed.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from tests.support.gaussian_world import keys
from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.distillation.networks import TERMS, Networks
from tlcm_jax.distillation.terms.adversarial import Adversarial, AdversarialSettings
from tlcm_jax.distillation.terms.base import Context, StudentOutputs
from tlcm_jax.distillation.terms.distribution_matching import (
    DistributionMatching,
    DistributionMatchingSettings,
)
from tlcm_jax.distillation.terms.latent_lpips import LatentLPIPSTerm
from tlcm_jax.distillation.terms.preference import LikedSettings, Preference, PreferenceSettings
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.families.base import LatentModel
from tlcm_jax.models.latent_lpips import LatentLPIPS
from tlcm_jax.models.lora import LoRAConfig

SCORER = "tests.support.roles"
TOY = LikedSettings(scorer=SCORER, weights="1")
WISH = PreferenceSettings(scorers={"toy": TOY}, held_out=SCORER, held_out_weights="-1")
MATCHING = DistributionMatchingSettings(guidance_scale=2.0, aux_updates=3)
ADVERSE = AdversarialSettings(loss="softplus", aux_updates=2)


def model_of(world) -> LatentModel:
    """A model of no family, for the terms that ask it nothing."""
    return LatentModel(process=world.process, params={}, configs={}, source="", folder="")


def uncounted(role, network):
    return network


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ToyScorer(Scorer):
    """10 less the distance of an image from a grey that the text names; or from its negative."""

    name: str = "toy"
    differentiable: bool = True
    threshold: float | None = 9.9
    sign: float = 1.0
    params: dict = dataclasses.field(default_factory=lambda: {"scale": np.float32(1)})

    def texts(self, prompts):
        greys = [float(p) if p.replace(".", "").isdigit() else 0.5 for p in prompts]
        return np.array(greys, np.float32)

    def score(self, params, images, texts):
        error = images - self.sign * bcast_right(jnp.asarray(texts), images)
        return params["scale"] * (10 - jnp.mean(jnp.square(error).reshape(len(images), -1), axis=1))


def load(path):
    """Makes this module a scorer's plug-in: the sign is the path of the weights."""
    return ToyScorer(sign=float(path))


class Distance(LatentLPIPS):
    """Of latents of any rank, with one weight."""

    @nn.compact
    def __call__(self, a, b):
        scale = self.param("scale", nn.initializers.ones_init(), ())
        return scale * jnp.mean(jnp.abs(jnp.sin(a) - jnp.sin(b)).reshape(len(a), -1), axis=1)


def networks_of(world, count=uncounted) -> Networks:
    """The world's, with a decoder; `count` wraps them by their role's name."""
    return dataclasses.replace(
        world.networks,
        student=lambda theta, frozen: count("student", world.student(theta, frozen)),
        teacher=lambda frozen: count("teacher", world.teacher(frozen)),
        decode=lambda frozen: lambda latents: frozen["scale"] * jnp.tanh(latents),
    )


def matching(world, settings=MATCHING, count=uncounted) -> DistributionMatching:
    """Its fake score is that of another Gaussian, the conditional one at first."""

    def fake_score(phi, frozen):
        def denoise(z, t, data):
            other = Gaussian(data.mean + phi["shift"], data.variance * jnp.exp(phi["spread"]))
            return frozen["scale"] * gaussian.x0(world.process, z, t, other)

        return count("fake_score", denoise)

    zeros = jnp.zeros(world.shape)
    return DistributionMatching(
        weight=settings.weight,
        settings=settings,
        networks=networks_of(world, count),
        init=lambda key: {"shift": zeros, "spread": zeros},
        fake_score=fake_score,
    )


def adversarial(world, settings=ADVERSE, count=uncounted, network=None) -> Adversarial:
    """Its discriminator is quadratic in every element, or `network`."""

    def discriminator(psi, frozen):
        def quadratic(z, t, conditioning):
            weighed = (psi["w"] * z + psi["v"] * z**2).reshape(len(z), -1)
            logits = (jnp.sum(weighed, axis=1) + psi["b"])[:, None]
            return (frozen["scale"] * logits,) * 2

        return count("discriminator", network or quadratic)

    zeros = jnp.zeros(world.shape)
    return Adversarial(
        weight=settings.weight,
        settings=settings,
        networks=networks_of(world, count),
        init=lambda key: {"w": zeros, "v": zeros, "b": jnp.zeros(())},
        discriminator=discriminator,
    )


def preference(world, settings=WISH, count=uncounted) -> Preference:
    """Loaded as a recipe's is."""
    return settings.load(model_of(world), networks_of(world, count), LoRAConfig())


def latent_lpips(weight=1.0) -> LatentLPIPSTerm:
    """Of latents of any rank."""
    return LatentLPIPSTerm(weight=weight, params={"scale": jnp.ones(())}, network=Distance())


def every_term(world, count=uncounted):
    """One of each, by name."""
    return {
        "latent_lpips": latent_lpips(),
        "preference": preference(world, WISH, count),
        "distribution_matching": matching(world, MATCHING, count),
        "adversarial": adversarial(world, ADVERSE, count),
    }


def frozen_of(world, terms):
    """The frozen tree of a stage with these terms."""
    return {**world.frozen, TERMS: {name: term.params for name, term in terms.items()}}


def outputs_of(world, x0, sample=None, target=None, target_time=None, **more):
    """What terms and auxiliary networks see of a student who predicts `x0`."""
    process, count = world.process, len(x0)
    time = process.end if target_time is None else target_time
    times = jnp.full(count, time, process.time_dtype)
    return StudentOutputs(x0, x0, target, sample, times, world.conditioning(count), **more)


def context_of(world, term, count, inputs=None, aux=None, seed=0):
    """What `term` may read beside the outputs of `count` samples."""
    return Context(
        frozen=world.frozen,
        params=term.params,
        inputs=inputs or {},
        aux_params=aux or {},
        keys=keys(seed, count),
    )
