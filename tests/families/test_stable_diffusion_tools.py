"""What cards say of ComfyUI, A1111 and Forge: times, sigmas, workflow; and where they say nothing.

The grids are tried against the programs' own formulae, written here over tables as they keep them.
"""

import dataclasses
import json

import numpy as np
import pytest

from tests.support.published import UNET
from tlcm_jax.diffusion.scheduler_config import process_from_config
from tlcm_jax.diffusion.timesteps import STUDENT_TIMESTEPS
from tlcm_jax.families import stable_diffusion_tools as tools
from tlcm_jax.io.image_size import ImageSize
from tlcm_jax.io.model_card import Recipe

SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
V = {**SCHEDULER, "prediction_type": "v_prediction"}
SIZE = ImageSize(height=832, width=1216)
RECIPE = Recipe(name="x", teacher="someone/sdxl", method="TLCM", times=dict(STUDENT_TIMESTEPS))


def their_sigmas():
    """The table that the programs keep, float64 to the end."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    return np.sqrt((1 - abar) / abar)


def simple(table, steps):
    """Their scheduler `simple`: every so manieth of a table, from its end."""
    return [table[-(1 + int(x * len(table) / steps))] for x in range(steps)]


@pytest.mark.parametrize("steps", range(1, 9))
def test_grids(steps):
    times = np.arange(1000)
    assert list(tools.comfyui_times(steps)) == simple(times, steps)
    assert list(tools.a1111_times(steps, 1.0)) == simple(times[19::20], steps)
    assert list(tools.a1111_times(steps, 0.0)) == simple(times, steps)


def test_sigmas_are_found_again_in_their_table():
    process = process_from_config(SCHEDULER)
    table = their_sigmas()
    for times in STUDENT_TIMESTEPS.values():
        typed = [float(tools._decimal(value)) for value in tools.sigmas(process, times)]
        assert typed[-1] == 0
        nearest = [int(np.abs(np.log(sigma / table)).argmin()) for sigma in typed[:-1]]
        assert tuple(nearest) == times
        np.testing.assert_allclose(typed[:-1], table[list(times)], rtol=1e-5)


def test_an_end_of_no_signal_is_theirs():
    sigma = tools.sigmas(process_from_config({**V, "rescale_betas_zero_snr": True}), (999, 499))
    assert sigma[0] == pytest.approx(4518.77, abs=0.01) and 1 < sigma[1] < 2
    assert tools._decimal(sigma[0]) == "4518.764"


@pytest.mark.parametrize("product", ["kohya", "single-file"])
def test_settings_of_each_program(product):
    text = tools.settings_text(RECIPE, product, process_from_config(SCHEDULER), UNET)
    assert "Sampler `lcm`, CFG 1" in text and "caution" not in text
    for steps in STUDENT_TIMESTEPS:
        row = next(line for line in text.splitlines() if line.startswith(f"| {steps} |"))
        assert ("`simple`" in row) == (steps in (1, 2, 8))
        assert ("ManualSigmas" in row) != (steps in (1, 2, 8))
    assert "`LCM`, schedule type `Simple`, CFG scale 1" in text
    assert "At 1 and 2 steps these are the student's times" in text
    assert "at 4: 999, 759, 499, 259 instead of 999, 749, 499, 124" in text
    assert ("<lora:tlcm_kohya:1>" in text) == (product == "kohya")
    assert ("strength 1" in text) == (product == "kohya")


def test_where_they_cannot_draw_as_we_do():
    def text(recipe=RECIPE, product="kohya", scheduler=SCHEDULER, unet=UNET):
        return tools.settings_text(recipe, product, process_from_config(scheduler), unet)

    assert "diffusers alone" in text(product="lora") and "leaves out the attention" in text(
        product="lora"
    )
    assert text(product="pipeline") == ""
    assert "share 0.4 of fresh noise" in text(dataclasses.replace(RECIPE, gamma=0.4))
    assert "Sampler `euler`" in text(dataclasses.replace(RECIPE, gamma=0.0))
    assert "another noise schedule" in text(scheduler={**SCHEDULER, "beta_end": 0.02})
    assert "another noise schedule" in text(
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"}
    )
    assert "none of those" in text(unet={**UNET, "block_out_channels": [32, 64]})
    told = text(scheduler=V)
    assert "this one predicts v" in told and "`ModelSamplingDiscrete`, `v_prediction`." in told
    assert "zsnr on" in text(scheduler={**V, "rescale_betas_zero_snr": True})
    told = text(scheduler={**SCHEDULER, "prediction_type": "sample"})
    assert "this one predicts x0" in told and "`ModelSamplingDiscrete`, `x0`." in told
    few = dataclasses.replace(RECIPE, times={3: (999, 499, 124)})
    assert "At 1" not in text(few)


@pytest.mark.parametrize("product", ["kohya", "single-file"])
@pytest.mark.parametrize("steps", [2, 4])
def test_workflow(product, steps):
    recipe = dataclasses.replace(RECIPE, times={steps: STUDENT_TIMESTEPS[steps]})
    nodes = json.loads(tools.workflow(recipe, product, process_from_config(V), SIZE))
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
    for inputs in kinds.values():  # every link leads to a node
        for value in inputs.values():
            assert not isinstance(value, list) or value[0] in nodes
    drawn = kinds["SamplerCustom"]
    assert drawn["cfg"] == 1 and kinds["KSamplerSelect"]["sampler_name"] == "lcm"
    grid = nodes[drawn["sigmas"][0]]
    if steps == 2:
        assert grid["inputs"]["scheduler"] == "simple" and grid["inputs"]["steps"] == 2
    else:
        typed = [float(value) for value in grid["inputs"]["sigmas"].split(", ")]
        np.testing.assert_allclose(typed[:-1], their_sigmas()[[999, 749, 499, 124]], rtol=1e-5)
        assert "e" not in grid["inputs"]["sigmas"]
    assert kinds["ModelSamplingDiscrete"]["sampling"] == "v_prediction"
    assert ("LoraLoaderModelOnly" in kinds) == (product == "kohya")
    latents = kinds["EmptyLatentImage"]
    assert (latents["width"], latents["height"]) == (1216, 832)


def test_no_workflow_for_what_they_cannot_draw():
    process = process_from_config(SCHEDULER)
    assert tools.workflow(RECIPE, "lora", process, SIZE) is None
    assert tools.workflow(dataclasses.replace(RECIPE, gamma=0.5), "kohya", process, SIZE) is None
    other = process_from_config({**SCHEDULER, "beta_end": 0.02})
    assert tools.workflow(RECIPE, "kohya", other, SIZE) is None
