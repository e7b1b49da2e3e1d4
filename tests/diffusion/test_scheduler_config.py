"""What is read of a scheduler's config, and what is refused by name."""

import numpy as np
import pytest
from absl import logging

from tlcm_jax.diffusion.process import DiscreteVP, RectifiedFlow
from tlcm_jax.diffusion.scheduler_config import SCHEDULERS, lcm_scheduler, process_from_config

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
    process = process_from_config(STABLE_DIFFUSION)
    assert isinstance(process, DiscreteVP) and process.num_train_timesteps == 1000
    assert process.prediction_type == "epsilon"
    # abar_0 = 1 - 0.00085; the published sigma_max = sigma/alpha of Stable Diffusion is 14.6146.
    np.testing.assert_allclose(process.alphas_cumprod[0], 1 - 0.00085, rtol=1e-6)
    np.testing.assert_allclose(process.sigmas[-1] / process.alphas[-1], 14.6146, rtol=1e-5)
    np.testing.assert_allclose(process.alphas**2 + process.sigmas**2, 1, rtol=3e-7)


def test_absent_keys_take_diffusers_defaults():
    process = process_from_config({"beta_schedule": "linear"})
    betas = np.linspace(0.0001, 0.02, 1000)
    np.testing.assert_allclose(process.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-5)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(
    "config",
    [{}, {"beta_start": None, "beta_schedule": None, "num_train_timesteps": None},
     {"beta_end": "0.013", "num_train_timesteps": 500}, {"trained_betas": [0.01, 0.02],
     "num_train_timesteps": 2}, {"prediction_type": "v_prediction",
     "rescale_betas_zero_snr": True}],
    ids=["silent", "null", "text", "trained", "v with zero terminal SNR"],
)  # fmt: skip
def test_an_exported_scheduler_has_the_levels_it_was_distilled_with(kind, config):
    process = process_from_config({"_class_name": kind, **config})
    exported = lcm_scheduler({"_class_name": kind, **config})
    assert process_from_config(exported) == process
    assert process.prediction_type == exported["prediction_type"]


def test_clip_sample_is_switched_off_as_diffusers_pipelines_do(caplog):
    logging.use_absl_handler()
    assert process_from_config(STABLE_DIFFUSION | {"clip_sample": True}) == process_from_config(
        STABLE_DIFFUSION
    )
    assert "clip_sample = true is switched off" in caplog.text


def test_trained_betas():
    betas = np.linspace(0.001, 0.02, 50)
    process = process_from_config({"trained_betas": betas.tolist(), "num_train_timesteps": 50})
    np.testing.assert_allclose(process.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-6)


def test_zero_terminal_snr_shifts_and_scales_the_root():
    """Lin et al. 2023, algorithm 1: the first level stays, the last is pure noise."""
    v = STABLE_DIFFUSION | {"prediction_type": "v_prediction"}
    plain, rescaled = (
        process_from_config(v | {"rescale_betas_zero_snr": rescale}) for rescale in (False, True)
    )
    assert rescaled.prediction_type == "v_prediction"
    assert rescaled.alphas[-1] == 0 and rescaled.sigmas[-1] == 1
    np.testing.assert_allclose(rescaled.alphas[0], plain.alphas[0], rtol=1e-6)
    ratio = (rescaled.alphas[1:] - rescaled.alphas[:-1]) / (plain.alphas[1:] - plain.alphas[:-1])
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)  # affine in the root


def test_a_flow_has_its_shift():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert process_from_config(config) == RectifiedFlow(3.0)
    assert process_from_config(config | {"num_train_timesteps": 50}) == RectifiedFlow(3.0, 50)
    assert process_from_config({"_class_name": config["_class_name"]}) == RectifiedFlow(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "'squaredcos_cap_v2'.*linear or scaled_linear"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True.*eps prediction"),
        ({"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr = 'false'.*true or false"),
        ({"clip_sample": 1}, "clip_sample = 1 .*true or false"),
        ({"thresholding": True}, "thresholding = True.*false"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas = True.*false"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting = True.*false"),
        (
            {"prediction_type": "flow"},
            "prediction_type = 'flow'.*v_prediction or sample",
        ),
        ({"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas.*shape \(2,\).*1000 numbers"),
        ({"beta_end": 1.5}, "must fall strictly"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting = True.*resolution",
        ),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        process_from_config(STABLE_DIFFUSION | change)


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
        process_from_config(config)


def test_absent_keys_take_the_class_s_own_defaults():
    silent = process_from_config({"_class_name": "LCMScheduler"})
    assert silent == process_from_config(STABLE_DIFFUSION)
