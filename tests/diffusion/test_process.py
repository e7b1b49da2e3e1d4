import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.diffusion.process import NoiseSchedule

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def test_stable_diffusion_levels():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    assert schedule.train_steps == 1000
    assert schedule.prediction_type == "epsilon"
    # abar_0 = 1 - 0.00085; the published sigma_max = sigma/alpha of Stable Diffusion is 14.6146.
    np.testing.assert_allclose(schedule.alphas_cumprod[0], 1 - 0.00085, rtol=1e-6)
    np.testing.assert_allclose(schedule.sigmas[-1] / schedule.alphas[-1], 14.6146, rtol=1e-5)
    np.testing.assert_allclose(schedule.alphas**2 + schedule.sigmas**2, 1, rtol=3e-7)


def test_absent_keys_take_diffusers_defaults():
    schedule = NoiseSchedule.from_config({"beta_schedule": "linear"})
    betas = np.linspace(0.0001, 0.02, 1000)
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-5)


def test_trained_betas():
    betas = np.linspace(0.001, 0.02, 50)
    schedule = NoiseSchedule.from_config(
        {"trained_betas": betas.tolist(), "num_train_timesteps": 50}
    )
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-6)


def test_v_prediction_is_read():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | {"prediction_type": "v_prediction"})
    assert schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "'squaredcos_cap_v2'.*linear or scaled_linear"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True.*false"),
        ({"thresholding": True}, "thresholding = True.*false"),
        ({"clip_sample": True}, "clip_sample = True.*false"),
        ({"prediction_type": "sample"}, "prediction_type = 'sample'.*epsilon or v_prediction"),
        ({"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas.*shape \(2,\).*1000 numbers"),
        ({"beta_end": 1.5}, "must fall strictly"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(STABLE_DIFFUSION | change)


def test_a_flow_matching_scheduler_is_refused_by_name():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no beta_schedule"):
        NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0},  # another abar
        {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0},
        {"_class_name": "MyScheduler", "beta_schedule": "linear"},
    ],
)
def test_other_classes_are_refused_by_name(config):
    with pytest.raises(ValueError, match=f"class {config['_class_name']} .*one of DDIM"):
        NoiseSchedule.from_config(config)


def test_absent_keys_take_the_class_s_own_defaults():
    silent = NoiseSchedule.from_config({"_class_name": "LCMScheduler"})
    np.testing.assert_array_equal(
        silent.alphas_cumprod, NoiseSchedule.from_config(STABLE_DIFFUSION).alphas_cumprod
    )


def test_levels_are_gathered_by_sample_inside_jit(schedule):
    t = jnp.array([0, 499, 999])
    alpha, sigma = jax.jit(lambda t: (schedule.alpha(t), schedule.sigma(t)))(t)
    assert alpha.shape == (3, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == jnp.float32
    np.testing.assert_array_equal(alpha[:, 0, 0, 0], schedule.alphas[[0, 499, 999]])
    np.testing.assert_array_equal(sigma[:, 0, 0, 0], schedule.sigmas[[0, 499, 999]])


def test_diffused_data_has_the_level_s_variance(schedule):
    x0 = jnp.full((1, 64, 64, 4), 2.0)
    z = schedule.diffuse(x0, jax.random.normal(jax.random.key(0), x0.shape), jnp.array([600]))
    np.testing.assert_allclose(z.mean(), 2 * schedule.alphas[600], atol=0.02)
    np.testing.assert_allclose(z.std(), schedule.sigmas[600], rtol=0.02)
