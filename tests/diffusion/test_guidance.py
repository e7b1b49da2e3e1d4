import jax.numpy as jnp
import numpy as np

from tlcm_jax.diffusion.guidance import guided, guided_and_plain


def linear(z, t, conditioning):
    """An eps in which every argument can be told from the others."""
    return z * conditioning["gain"][:, None, None, None] + t[:, None, None, None]


def conditional():
    return {"gain": jnp.arange(1.0, 33.0)}


def test_guidance_extrapolates_from_null_to_conditional(latents):
    null = {"gain": jnp.array([0.5])}
    eps = guided(linear, 8.0, null)(latents.z, latents.t, conditional())
    gain = 0.5 + 8 * (conditional()["gain"] - 0.5)
    np.testing.assert_allclose(eps, linear(latents.z, latents.t, {"gain": gain}), rtol=2e-5)


def test_scale_one_is_the_conditional_model_and_zero_the_null(latents):
    null = {"gain": jnp.array([0.5])}
    one = guided(linear, 1.0, null)(latents.z, latents.t, conditional())
    zero = guided(linear, 0.0, null)(latents.z, latents.t, conditional())
    np.testing.assert_allclose(one, linear(latents.z, latents.t, conditional()), rtol=1e-5)
    np.testing.assert_allclose(
        zero, linear(latents.z, latents.t, {"gain": jnp.full(32, 0.5)}), rtol=1e-6
    )


def test_one_call_on_twice_the_batch_and_absent_fields_pass(latents):
    calls = []

    def denoiser(z, t, conditioning):
        calls.append((z.shape, t.shape, conditioning["text"].shape, conditioning["pooled"]))
        return z.astype(jnp.bfloat16)

    conditioning = {"text": jnp.ones((32, 7, 5)), "pooled": None}
    null = {"text": jnp.zeros((1, 7, 5)), "pooled": None}
    eps = guided(denoiser, 8.0, null)(latents.z, latents.t, conditioning)
    assert calls == [((64, 4, 4, 3), (64,), (64, 7, 5), None)]
    assert eps.dtype == jnp.float32


def test_the_conditional_eps_comes_with_the_same_call(latents):
    null = {"gain": jnp.array([0.5])}
    for scale in (1.0, 8.0):
        calls = []

        def denoiser(z, t, conditioning, calls=calls):
            calls.append(len(z))
            return linear(z, t, conditioning)

        both = guided_and_plain(denoiser, scale, null)(latents.z, latents.t, conditional())
        assert len(calls) == 1
        expected = guided(linear, scale, null)(latents.z, latents.t, conditional())
        np.testing.assert_array_equal(both[0], expected)
        plain = linear(latents.z, latents.t, conditional())
        np.testing.assert_allclose(both[1], plain, rtol=1e-6)
