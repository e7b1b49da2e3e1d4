"""A process of every kind, and arrays of its times."""

import jax
import jax.numpy as jnp
import numpy as np

from tlcm_jax.diffusion.process import Process, RectifiedFlow
from tlcm_jax.diffusion.scheduler_config import process_from_config

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROCESSES = {
    "eps": process_from_config(SD),
    "v": process_from_config(SD | {"prediction_type": "v_prediction"}),
    "v-zero-snr": process_from_config(
        SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ),
    "flow": RectifiedFlow(),
    "flow-shift-3": RectifiedFlow(shift=3.0),
}


def times(process: Process, train_steps) -> jax.Array:
    """An array of the process's own times."""
    found = [process.time(int(step)) for step in np.ravel(train_steps)]
    return jnp.asarray(found, process.time_dtype).reshape(np.shape(train_steps))
