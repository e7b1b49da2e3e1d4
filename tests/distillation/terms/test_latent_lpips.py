"""The latent LPIPS term: what it compares, and what it loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import roles
from tests.support.roles import context_of, latent_lpips, outputs_of
from tlcm_jax.distillation.terms.latent_lpips import LatentLPIPSSettings
from tlcm_jax.io.latent_lpips_files import save_latent_lpips
from tlcm_jax.models.latent_lpips import LatentLPIPS
from tlcm_jax.models.lora import LoRAConfig


def load(world, folder, **changes):
    settings = LatentLPIPSSettings(weights=str(folder), **changes)
    return settings.load(roles.model_of(world), world.networks, LoRAConfig())


def test_jump_and_target_are_compared(any_world):
    """Not the prediction, which inside a segment lies elsewhere."""
    world, term = any_world, latent_lpips()
    x0, jump, target = (jax.random.normal(jax.random.key(i), (3, *world.shape)) for i in range(3))
    outputs = outputs_of(world, x0, target=target)._replace(jump=jump)
    found, metrics = term.loss(outputs, context_of(world, term, 3))
    error = np.abs(np.sin(np.asarray(jump)) - np.sin(np.asarray(target)))
    np.testing.assert_allclose(found, error.reshape(3, -1).mean(1), rtol=1e-5)
    assert metrics == {} and term.needed_outputs == ("target",) and term.aux is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a network for one channel."""
    folder, network = tmp_path_factory.mktemp("lpips"), LatentLPIPS(widths=(2, 2, 2, 2, 2))
    z = jnp.zeros((1, 4, 4, 1))
    params = jax.jit(network.init)(jax.random.key(0), z, z)["params"]
    save_latent_lpips(folder, network, params, 1, {})
    return folder, network


def test_it_is_loaded_from_a_folder(world, saved):
    folder, network = saved
    term = load(world, folder, weight=0.5)
    assert (term.weight, term.network) == (0.5, network)
    x = jax.random.normal(jax.random.key(0), (2, *world.shape))
    outputs = outputs_of(world, x, target=x + 1)
    found, _ = jax.jit(term.loss)(outputs, context_of(world, term, 2))
    expected = network.apply({"params": term.params}, x, x + 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_without_a_folder_the_term_is_left_out(world, tmp_path):
    assert load(world, tmp_path) is None


def test_one_for_other_latents_is_refused(any_world, saved):
    if any_world.shape[-1] == 1:
        assert load(any_world, saved[0]) is not None
        return
    with pytest.raises(ValueError, match="a latent LPIPS for 1 channels, where .* have 4"):
        load(any_world, saved[0])


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="weight = -1.0: must be at least 0"):
        LatentLPIPSSettings(weights="", weight=-1.0)
