import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.diffusion import prediction
from tlcm_jax.diffusion.process import NoiseSchedule


def test_the_table_closes(schedule, latents):
    """x0 -> eps -> v -> x0 and v -> eps come back to where they began."""
    z, x0, t, _ = latents
    eps = prediction.eps_from_x0(schedule, z, x0, t)
    v = prediction.v_from_eps(schedule, z, eps, t)
    # Dividing by alpha (0.07 at the noisy end) magnifies rounding.
    np.testing.assert_allclose(prediction.x0_from_eps(schedule, z, eps, t), x0, atol=1e-5)
    np.testing.assert_allclose(prediction.x0_from_v(schedule, z, v, t), x0, atol=1e-5)
    np.testing.assert_allclose(prediction.eps_from_v(schedule, z, v, t), eps, atol=1e-5)


def test_predictions_of_a_diffused_latent_are_its_parts(schedule, latents):
    eps, x0, t, _ = latents
    z = schedule.diffuse(x0, eps, t)
    np.testing.assert_allclose(prediction.eps_from_x0(schedule, z, x0, t), eps, atol=1e-5)
    np.testing.assert_allclose(prediction.x0_from_eps(schedule, z, eps, t), x0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_raw_network_of_either_kind_becomes_the_same_denoiser(schedule, latents, prediction_type):
    noise, x0, t, _ = latents
    z = schedule.diffuse(x0, noise, t)
    schedule = NoiseSchedule(schedule.alphas_cumprod, prediction_type)

    def network(z, t, conditioning):
        v = schedule.alpha(t) * noise - schedule.sigma(t) * x0
        return {"epsilon": noise, "v_prediction": v}[prediction_type]

    denoiser = prediction.epsilon_denoiser(schedule, network)
    np.testing.assert_allclose(denoiser(z, t, None), noise, atol=1e-6)
    found = prediction.predict_x0(denoiser, schedule, z, t, None)
    np.testing.assert_allclose(found, x0, atol=1e-5)


def test_a_half_precision_network_is_raised_to_float32(schedule, latents):
    denoiser = prediction.epsilon_denoiser(schedule, lambda z, t, c: z.astype(jnp.bfloat16))
    assert denoiser(latents.z, latents.t, None).dtype == jnp.float32
