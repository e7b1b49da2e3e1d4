"""A control network learns what pictures have to do with their maps; the UNet stays as it is.

Of pictures with captions and maps, x0 their latents, z_t = alpha_t x0 + sigma_t e, and p the UNet's
prediction with the network's residuals (noise, v or x0, as the family predicts it; p* is the one
that x0 and e make right),

    L = mean |p - p*|^2 / mean |p*|^2,        t ~ U{0 .. T-1},                    (1)

the objective of ControlNet (Zhang et al. 2023, arXiv 2302.05543) and T2I-Adapter (Mou et al. 2023,
arXiv 2302.08453). The denominator is 1 where noise is predicted; where x0 is, it makes the loss a
share of what is to be predicted, however small the latents are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.sampling import normal
from tlcm_jax.diffusion.timesteps import uniform_times
from tlcm_jax.distillation.losses import mse
from tlcm_jax.distillation.objective import drop_prompts

# A batch's thirds by time, from the clean end, whose errors are told apart.
_THIRDS = ("clean", "middle", "noisy")


def control_loss(
    model: Any, network: Any, unconditional: float = 0.1
) -> Callable[[PyTree[Array], Mapping[str, Any], PRNGKeyArray], tuple[Array, dict[str, Array]]]:
    """Equation (1), as `training.fit` takes it.

    Args:
      model: without weights.
      network: a ControlNet or a T2I-Adapter.
      unconditional: share of the pictures that are shown without their captions, of which the map
        alone has to tell what there is.

    Returns:
      `(the network's params, batch, key) -> (loss, metrics)`. A batch holds `latents`
      `[b, h, w, c]`, their `conditioning` with the maps in it, the null conditioning `null`, and
      the backbone's weights `frozen`.
    """
    process = model.process

    def loss(
        params: PyTree[Array], batch: Mapping[str, Any], key: PRNGKeyArray
    ) -> tuple[Array, dict[str, Array]]:
        x0, told = batch["latents"], batch["conditioning"]
        size = len(x0)
        time, noise, drop = jax.random.split(key, (3, size))
        low, high = (
            jnp.full(size, end, process.time_dtype) for end in (process.end, process.start)
        )
        t = uniform_times(process, time, low, high)
        e = normal(noise, x0.shape[1:])
        z = process.add_noise(x0, e, t)
        told = drop_prompts(told, model.null_of(batch["null"], told), drop, unconditional)
        prediction = model.predict(batch["frozen"], z, t, told, controls=[(network, params)])
        right = process.from_x0(x0, z, t)
        each = mse(prediction.astype(jnp.float32), right) / jnp.mean(jnp.square(right))
        third = jnp.minimum(3 * (t - low) // (high - low), 2)
        return jnp.mean(each), {
            name: jnp.sum(each * (third == i)) / jnp.maximum(jnp.sum(third == i), 1)
            for i, name in enumerate(_THIRDS)
        }

    return loss
