import jax.numpy as jnp
import numpy as np

from tlcm_jax.diffusion.guidance import guided, guided_and_plain
from tlcm_jax.diffusion.process import bcast_right

NULL = {"gain": jnp.array([0.5])}
CONDITIONAL = {"gain": jnp.arange(1.0, 33.0)}


def null_of(conditioning):
    return NULL


def linear(z, t, conditioning):
    """An x0 in which every argument can be told from the others."""
    return z * bcast_right(conditioning["gain"], z) + bcast_right(t, z).astype(jnp.float32)


def test_guidance_extrapolates_from_null_to_conditional(latents):
    x0 = guided(linear, 8.0, null_of)(latents.z, latents.t, CONDITIONAL)
    gain = 0.5 + 8 * (CONDITIONAL["gain"] - 0.5)
    expected = linear(latents.z, latents.t, {"gain": gain})
    # The term in t cancels to rounding, eight times.
    np.testing.assert_allclose(x0, expected, rtol=2e-5, atol=1e-3)


def test_scale_one_is_the_conditional_model_and_zero_the_null(latents):
    z, t = latents.z, latents.t
    one = guided(linear, 1.0, null_of)(z, t, CONDITIONAL)
    zero = guided(linear, 0.0, null_of)(z, t, CONDITIONAL)
    np.testing.assert_array_equal(one, linear(z, t, CONDITIONAL))
    np.testing.assert_allclose(zero, linear(z, t, {"gain": jnp.full(32, 0.5)}), rtol=1e-6)


def test_one_call_on_twice_the_batch_and_absent_fields_pass(latents):
    calls = []

    def denoiser(z, t, conditioning):
        calls.append((z.shape, t.shape, conditioning["text"].shape, conditioning["pooled"]))
        return z

    conditioning = {"text": jnp.ones((32, 7, 5)), "pooled": None}
    null = {"text": jnp.zeros((1, 7, 5)), "pooled": None}
    guided(denoiser, 8.0, lambda conditioning: null)(latents.z, latents.t, conditioning)
    assert calls == [((64, *latents.z.shape[1:]), (64,), (64, 7, 5), None)]


def test_the_null_may_keep_what_is_no_text(latents):
    """A control image is the conditioning's own, on both sides of guidance."""
    z = latents.z
    conditioning = {"gain": CONDITIONAL["gain"], "control": z + 1}

    def null_keeping_control(conditioning):
        return conditioning | NULL

    def denoiser(z, t, conditioning):
        return linear(z, t, conditioning) + conditioning["control"]

    x0 = guided(denoiser, 8.0, null_keeping_control)(z, latents.t, conditioning)
    text = guided(linear, 8.0, null_of)(z, latents.t, CONDITIONAL)
    np.testing.assert_allclose(x0, text + z + 1, rtol=2e-5, atol=1e-3)


def test_the_conditional_x0_comes_with_the_same_call(latents):
    for scale in (1.0, 8.0):
        calls = []

        def denoiser(z, t, conditioning, calls=calls):
            calls.append(len(z))
            return linear(z, t, conditioning)

        both = guided_and_plain(denoiser, scale, null_of)(latents.z, latents.t, CONDITIONAL)
        assert len(calls) == 1
        expected = guided(linear, scale, null_of)(latents.z, latents.t, CONDITIONAL)
        np.testing.assert_array_equal(both[0], expected)
        np.testing.assert_allclose(both[1], linear(latents.z, latents.t, CONDITIONAL), rtol=1e-6)
