"""A text adapter learns to steer the UNet as the English encoders do (PEA-Diffusion, 2311.17086).

Of pairs of prompts that say the same, one in each language, with e the noise in a latent z_t,
eps' the frozen UNet's prediction on the adapter's text and eps on the English one, and f', f the
states after its blocks down, middle and up,

    L = |eps' - e|^2 + |eps' - eps|^2 + w sum over blocks |f' - f|^2,   w = 0.1,   (1)

all as means over elements. No picture is read: z_t is a sample of the student's own (a few steps
from the English prompt), noised again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.sampling import normal, sample
from tlcm_jax.diffusion.timesteps import uniform_times
from tlcm_jax.distillation.losses import mse
from tlcm_jax.distillation.objective import drop_prompts

FEATURE_WEIGHT = 0.1


def transfer_loss(
    prediction: Float[Array, " b *latent"],
    target: Float[Array, " b *latent"],
    noise: Float[Array, " b *latent"],
    states: Mapping[str, Float[Array, "b _ _ _"]],
    target_states: Mapping[str, Float[Array, "b _ _ _"]],
    weight: float = FEATURE_WEIGHT,
) -> tuple[Float[Array, " b"], dict[str, Array]]:
    """Equation (1).

    Args:
      prediction: eps'.
      target: eps.
      noise: e.
      states: f', by block.
      target_states: f, of the same blocks.
      weight: w.

    Returns:
      The loss of each sample, and its three parts, unweighted, each `[b]`.

    Raises:
      ValueError: states of other blocks.
    """
    if states.keys() != target_states.keys():
        raise ValueError(f"states of {sorted(states)} and of {sorted(target_states)}")
    parts = {
        "noise": mse(prediction, noise),
        "prediction": mse(prediction, target),
        "features": sum(
            (mse(states[name], target_states[name]) for name in states),
            start=jnp.zeros(len(noise)),
        ),
    }
    return parts["noise"] + parts["prediction"] + weight * parts["features"], parts


def text_transfer(
    model: Any,
    timesteps: Sequence[int],
    unconditional: float = 0.1,
    feature_weight: float = FEATURE_WEIGHT,
) -> Callable[[PyTree[Array], Mapping[str, Any], PRNGKeyArray], tuple[Array, dict[str, Array]]]:
    """Equation (1) on a model with a text adapter, as `training.fit` takes it.

    Args:
      model: with `text_adapter`, its own text encoders still among its weights.
      timesteps: at which the student samples.
      unconditional: share of the pairs that are the empty prompt in both languages.
      feature_weight: w.

    Returns:
      `(adapter's params, batch, key) -> (loss, metrics)`. A batch holds token ids `english` (a
      tuple), `other` `[b, n]` and `empty` `[1, n]`, the null conditioning `null`, and under
      `frozen` the weights of the `teacher`, the `student` and the `texts`.
    """
    process, texts = model.process, model.text_adapter

    def loss(
        params: PyTree[Array], batch: Mapping[str, Any], key: PRNGKeyArray
    ) -> tuple[Array, dict[str, Array]]:
        frozen, size = batch["frozen"], len(batch["other"])
        keys = jax.random.split(key, (5, size))
        first, renoise, time, noise, drop = keys
        english = model.encode_english(frozen["texts"], batch["english"])
        student = model.denoiser(frozen["student"])
        shape = model.latent_shape()
        z0 = sample(student, process, normal(first, shape), english, timesteps, renoise)
        low, high = (
            jnp.full(size, end, process.time_dtype) for end in (process.end, process.start)
        )
        t = uniform_times(process, time, low, high)
        e = normal(noise, shape)
        z = process.add_noise(z0, e, t)
        # Both languages of a pair are dropped together.
        english = drop_prompts(english, model.null_of(batch["null"], english), drop, unconditional)
        ids = drop_prompts(batch["other"], batch["empty"], drop, unconditional)
        z, t, english, ids = jax.lax.stop_gradient((z, t, english, ids))
        other = texts.conditioning(params, frozen["texts"], ids, english)

        def ask(conditioning: Any) -> tuple[Array, Mapping[str, Array]]:
            raw, states = model.predict_states(frozen["teacher"], z, t, conditioning)
            return process.to_eps(z, process.to_x0(raw, z, t), t), states

        target, target_states = jax.lax.stop_gradient(ask(english))
        prediction, states = ask(other)
        each, parts = transfer_loss(prediction, target, e, states, target_states, feature_weight)
        return jnp.mean(each), {name: jnp.mean(part) for name, part in parts.items()}

    return loss
