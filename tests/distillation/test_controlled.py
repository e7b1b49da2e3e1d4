"""Distillation through a frozen ControlNet: student and teacher are steered by the same maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.controls import tiny_controlnet, write_control
from tests.support.tiny_pipeline import UNET, random_adapter, write_tiny_pipeline
from tlcm_jax.distillation.mlcd import MLCDSettings
from tlcm_jax.distillation.networks import BASE, CONTROLS, NULL, init_adapter, model_networks
from tlcm_jax.distillation.objective import repeat
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.families.load import load_model
from tlcm_jax.models.lora import LoRAConfig


@pytest.mark.slow
def test_pairs_and_the_loss_s_gradient_go_through_it(tmp_path):
    model = load_model(write_tiny_pipeline(tmp_path / "tiny"))
    control = model.load_control(write_control(tmp_path / "canny", tiny_controlnet(UNET)))
    adapter = LoRAConfig(rank=2, targets=("to_q",))
    networks = model_networks(model, adapter, controls=[control.network])
    frozen = {
        BASE: model.params["unet"], NULL: model.null_conditioning(), CONTROLS: (control.params,),
    }  # fmt: skip
    text = model.encode(["a red cat"])
    image = jnp.asarray(np.random.default_rng(0).random((1, 32, 32, 3), np.float32))
    told = model.with_controls(text, [image], [2.0])
    objective = MLCDSettings(guidance_scale=2.0).build(networks)
    keys = jax.random.split(jax.random.key(0), 1)

    @jax.jit
    def pairs_of(frozen, conditioning):
        return objective.sample_pairs({}, frozen, {"conditioning": conditioning}, keys)

    pairs = pairs_of(frozen, told)
    silent = pairs_of(frozen, model.with_controls(text, [image], [0.0]))
    assert np.linalg.norm(pairs.z_n - silent.z_n) > 1e-4 * np.linalg.norm(silent.z_n)
    # What a pair is conditioned on has its prompt's map.
    again = repeat(told, objective.pairs_per_prompt)
    np.testing.assert_array_equal(pairs.conditioning.controls[0].image, again.controls[0].image)

    factors = random_adapter(
        init_adapter(model, adapter, jax.random.key(1)), np.random.default_rng(2)
    )
    two = jax.tree.map(lambda leaf: leaf[:2], pairs)
    loss = StageLoss(objective, {})
    halves = jax.random.split(keys[0], 2)
    mean = lambda theta: jnp.mean(loss(theta, frozen, two, halves, {})[0])  # noqa: E731
    gradient = jax.jit(jax.grad(mean))(factors)
    assert all(float(jnp.linalg.norm(leaf)) > 0 for leaf in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match="1 control networks, and maps for 0"):
        networks.teacher(frozen)(pairs.z_m, pairs.t_m, repeat(text, objective.pairs_per_prompt))
