"""What each rematerialisation policy keeps of the forward pass."""

import jax
import jax.numpy as jnp

from tlcm_jax import paths
from tlcm_jax.families.load import abstract_model


def kept_bytes(remat):
    """Bytes that a forward pass hands to its backward pass, the weights apart."""
    model = abstract_model(paths.EMOJI_XL, remat=remat)
    params = model.params["unet"]
    z = jnp.zeros((1, *model.latent_shape()))
    ids = 2 * (jax.ShapeDtypeStruct((1, 77), jnp.int32),)
    conditioning = jax.eval_shape(model.encode_tokens, model.text_params, ids)

    def forward(params, conditioning):
        return jax.vjp(lambda p: model.predict(p, z, jnp.zeros(1), conditioning), params)[1]

    program = jax.make_jaxpr(forward)(params, conditioning).jaxpr
    given = {id(var) for var in program.invars}
    kept = {id(v): v.aval for v in program.outvars if id(v) not in given}
    return sum(aval.size * aval.dtype.itemsize for aval in kept.values())


def test_each_policy_keeps_less_than_the_one_before():
    policies = ("none", "attention", "blocks", "all")
    none, attention, blocks, everything = map(kept_bytes, policies)
    assert everything < blocks < attention < none
