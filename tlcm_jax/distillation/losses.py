"""The losses, as functions of arrays: `[n]` values from `[n, *latent]` latents or `[n]` scores.

Nothing here knows a network or a setting; everything can be called in a notebook.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tlcm_jax.diffusion.process import bcast_right


def mean_per_sample(x: Float[Array, " n *latent"]) -> Float[Array, " n"]:
    """The mean over a sample's elements."""
    return jnp.mean(x.reshape(len(x), -1), axis=1)


def norm_per_sample(x: Float[Array, " n *latent"]) -> Float[Array, " n"]:
    """The Euclidean norm of each sample."""
    return jnp.sqrt(jnp.sum(jnp.square(x).reshape(len(x), -1), axis=1))


def mse(
    prediction: Float[Array, " n *latent"], target: Float[Array, " n *latent"]
) -> Float[Array, " n"]:
    """The mean over a sample's elements of the squared error."""
    return mean_per_sample(jnp.square(prediction - target))


def pseudo_huber(
    prediction: Float[Array, " n *latent"], target: Float[Array, " n *latent"], c: float
) -> Float[Array, " n"]:
    """The mean over a sample's elements of sqrt(error^2 + c^2) - c, c > 0.

    Quadratic below c and linear above it. The distance of latent consistency models (arXiv
    2310.04378) and of SCott (arXiv 2403.01505).
    """
    square = jnp.square(prediction - target)
    # sqrt(square + c^2) - c, without the cancellation where the error is small.
    return mean_per_sample(square / (jnp.sqrt(square + c * c) + c))


def min_snr_weight(snr: Float[Array, " n"], limit: float) -> Float[Array, " n"]:
    """The weight min(SNR + 1, limit) of an error in x0; a limit of 1 weighs all times alike.

    Multistep consistency models (Heek et al. 2024, arXiv 2403.06807), whose limit is 5.
    """
    return jnp.minimum(snr + 1, limit)


def preference(
    score: Float[Array, " n"],
    negative_score: Float[Array, " n"],
    threshold: float,
    mismatched: Bool[Array, " n"],
) -> Float[Array, " n"]:
    """relu(s0 - s(D(x), c)) + relu(s(D(x), c_neg)) (TLCM, arXiv 2406.05768).

    Args:
      score: of the images with their own prompts.
      negative_score: of the same images with other prompts.
      threshold: s0, the score of an image that is good enough.
      mismatched: whether the other prompt is another one; the second part counts only there.
    """
    return jax.nn.relu(threshold - score) + mismatched * jax.nn.relu(negative_score)


def reward_weighted(
    x: Float[Array, " n *latent"],
    state: Float[Array, " n *latent"],
    alpha: Float[Array, " n"],
    sigma: Float[Array, " n"],
    weight: Float[Array, " n"],
) -> Float[Array, " n"]:
    """A |z_s - alpha_s x|^2 / (2 sigma_s^2), the mean over a sample's elements.

    But for that mean, -A log p of a state that was drawn from N(alpha_s x, sigma_s^2 I).

    Args:
      x: the student's prediction.
      state: z_s, where its sampler went from there.
      alpha: alpha_s.
      sigma: sigma_s, above 0.
      weight: A, of either sign.
    """
    error = mse(bcast_right(alpha, x) * x, state)
    return weight * error / (2 * jnp.square(sigma))


def standardised(scores: Float[Array, " n"]) -> Float[Array, " n"]:
    """Scores less their mean, in units of their standard deviation; 0 where they are all alike."""
    spread = jnp.std(scores)
    apart = spread > 1e-6 * jnp.max(jnp.abs(scores))
    return jnp.where(apart, (scores - jnp.mean(scores)) / jnp.where(apart, spread, 1.0), 0.0)


def distribution_matching_grad(
    x: Float[Array, " n *latent"],
    real_x0: Float[Array, " n *latent"],
    fake_x0: Float[Array, " n *latent"],
) -> Float[Array, " n *latent"]:
    """(x0_fake - x0_real) / mean |x - x0_real|, the mean over a sample (DMD, arXiv 2311.18828).

    Args:
      x: what the student made.
      real_x0: what the teacher sees in a noisy copy of x.
      fake_x0: what the fake score sees in it.
    """
    size = bcast_right(mean_per_sample(jnp.abs(x - real_x0)), x)
    return (fake_x0 - real_x0) / jnp.maximum(size, 1e-8)


def importance_weight(
    added: Float[Array, " n *latent"], held: Float[Array, " n *latent"]
) -> Float[Array, " n"]:
    """exp((|e|^2 - |m|^2) / 2n), n the elements of a sample (TDM, arXiv 2503.06674).

    The density of z if its data was noised straight to t', over that of how z came about: a state
    that holds noise already, noised further. The ratio of the two Gaussians' widths, the same for
    all samples of a time, is left out; and where the ratio of densities has the sum over elements,
    the authors' program has the mean, without which a single sample would outweigh all others.

    Args:
      added: e, the fresh noise.
      held: m, all noise that z then holds, beside alpha_t' x.
    """
    return jnp.exp(0.5 * (mean_per_sample(jnp.square(added)) - mean_per_sample(jnp.square(held))))


def mean_logit(
    maps: Sequence[Float[Array, "n ..."]], function: Callable[[Array], Array]
) -> Float[Array, " n"]:
    """The mean of a function of a discriminator's logits: over a map, then over the maps."""
    means = [mean_per_sample(function(logits.astype(jnp.float32))) for logits in maps]
    return jnp.mean(jnp.stack(means), axis=0)


def discriminator_loss(
    real: Sequence[Float[Array, "n ..."]], fake: Sequence[Float[Array, "n ..."]], kind: str
) -> Float[Array, " n"]:
    """What the discriminator minimises.

    Args:
      real: maps of logits of what it should call real.
      fake: of what it should call fake.
      kind: "hinge", relu(1 - real) + relu(1 + fake), or "softplus", the cross-entropy.
    """
    if kind == "hinge":
        return mean_logit(real, lambda s: jax.nn.relu(1 - s)) + mean_logit(
            fake, lambda s: jax.nn.relu(1 + s)
        )
    return mean_logit(real, lambda s: jax.nn.softplus(-s)) + mean_logit(fake, jax.nn.softplus)


def generator_loss(fake: Sequence[Float[Array, "n ..."]], kind: str) -> Float[Array, " n"]:
    """What the student minimises: -fake ("hinge") or softplus(-fake) ("softplus")."""
    if kind == "hinge":
        return mean_logit(fake, jnp.negative)
    return mean_logit(fake, lambda s: jax.nn.softplus(-s))
