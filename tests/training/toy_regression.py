"""A stage small enough to check by hand: linear regression that draws its own data."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from tlcm_jax.training import loop, mesh, optimizers, sharding, step

FEATURES, TARGETS, BATCH, PATHS = 16, 8, 16, 4
# The moments and the kernel are split in the toy although they are tiny.
RULES = ((r"bias", sharding.replicate), (r".*", sharding.fsdp(min_size=8)))


def objective():
    """Each prompt yields PATHS examples: noisy inputs and the targets of `frozen`."""

    def produce(trainable, frozen, batch, key):
        noise = jax.random.normal(key, (BATCH, PATHS, FEATURES))
        x = (batch["conditioning"][:, None] + noise).reshape(-1, FEATURES)
        return {"x": x, "y": x @ frozen["w"]}

    def loss(trainable, frozen, examples, key):
        layer = trainable["down_blocks.0"]["attn.1"]
        residual = examples["x"] @ layer["kernel"] + layer["bias"] - examples["y"]
        per_sample = jnp.sum(residual**2, axis=-1)
        return per_sample, {"error": jnp.abs(residual).mean(-1), "bias": layer["bias"].mean()}

    return SimpleNamespace(produce=produce, loss=loss)


def trainable():
    kernel = jnp.linspace(-1, 1, FEATURES * TARGETS).reshape(FEATURES, TARGETS)
    return {"down_blocks.0": {"attn.1": {"kernel": kernel, "bias": jnp.zeros(TARGETS)}}}


def frozen():
    return {
        "w": jnp.sin(jnp.arange(FEATURES * TARGETS, dtype=jnp.float32)).reshape(FEATURES, TARGETS)
    }


def host_batch(k):
    rows = np.arange(BATCH * FEATURES).reshape(BATCH, FEATURES)
    return {"conditioning": np.cos(0.1 * rows + k).astype(np.float32)}


@functools.cache
def program(on, rate, settings):
    """Compiled once for all runs of a test file: a step keeps nothing between calls."""
    optimizer = optimizers.adamw(rate, warmup_updates=2)
    return step.make_step(objective(), optimizer, settings, on, RULES), optimizer


def stage(name="first", steps=6, on=None, rate=1e-2, batches=None, accumulate=1) -> loop.Stage:
    made, optimizer = program(on, rate, step.StepSettings(updates=2, accumulate=accumulate))
    return loop.Stage(
        name=name,
        step=made,
        optimizer=optimizer,
        steps=steps,
        batches=batches or (lambda k: mesh.shard_batch(on, host_batch(k))),
        evaluations_per_example=3.0,
    )


def values(tree):
    """Leaves by name on the host, keys as their data."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        sharding.leaf_name(path): np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for path, leaf in flat
    }
