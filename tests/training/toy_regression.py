"""A stage small enough to check by hand: linear regression that draws its own data."""

import jax
import jax.numpy as jnp
import numpy as np

from tlcm_jax.training import loop, mesh, optimizers, sharding
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.metrics import MetricsWriter
from tlcm_jax.training.pairs import PairSource
from tlcm_jax.training.retention import Keep
from tlcm_jax.training.stage import StageSpec

FEATURES, TARGETS, PROMPTS, PATHS, BATCH = 16, 8, 16, 4, 32
# The moments and the kernel are split in the toy although they are tiny.
RULES = ((r"bias", sharding.replicate), (r".*", sharding.fsdp(min_size=8)))


def sample(trainable, frozen, batch, keys):
    """Each prompt yields PATHS pairs: noisy inputs and the targets of `frozen`."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (PATHS, FEATURES)))(keys)
    x = (batch["conditioning"][:, None] + noise).reshape(-1, FEATURES)
    return {"x": x, "y": x @ frozen["w"]}


def sample_by_student(trainable, frozen, batch, keys):
    """Pairs whose targets lean on what the student says at the refill."""
    pairs = sample(trainable, frozen, batch, keys)
    return {**pairs, "y": pairs["y"] + 0.1 * output(trainable, pairs["x"])}


def output(trainable, x):
    layer = trainable["down_blocks.0"]["attn.1"]
    return x @ layer["kernel"] + layer["bias"]


def loss(trainable, frozen, pairs, keys, others):
    residual = output(trainable, pairs["x"]) - pairs["y"]
    per_sample = jnp.sum(residual**2, axis=-1)
    bias = trainable["down_blocks.0"]["attn.1"]["bias"]
    return per_sample, {"error": jnp.abs(residual).mean(-1), "bias": bias.mean()}


def trainable():
    kernel = jnp.linspace(-1, 1, FEATURES * TARGETS).reshape(FEATURES, TARGETS)
    return {"down_blocks.0": {"attn.1": {"kernel": kernel, "bias": jnp.zeros(TARGETS)}}}


def frozen():
    return {
        "w": jnp.sin(jnp.arange(FEATURES * TARGETS, dtype=jnp.float32)).reshape(FEATURES, TARGETS)
    }


def host_batch(r, prompts=PROMPTS):
    rows = np.arange(prompts * FEATURES).reshape(prompts, FEATURES)
    return {"conditioning": np.cos(0.1 * rows + r).astype(np.float32)}


def pairs(k=0):
    """A mini-batch made by hand."""
    x = np.random.default_rng(k).normal(size=(BATCH, FEATURES)).astype(np.float32)
    return {"x": x, "y": np.asarray(x @ frozen()["w"])}


def source(on=None, batches=None, **changes) -> PairSource:
    options = dict(
        sample=sample,
        batches=batches or (lambda r: mesh.shard_batch(on, host_batch(r))),
        prompts=PROMPTS,
        pairs_per_prompt=PATHS,
        batch_size=BATCH,
    )
    return PairSource(**(options | changes))


def spec(name="first", steps=6, on=None, rate=1e-2, batches=None, pairs=None, **changes):
    """Two steps a refill unless `pairs` says otherwise."""
    options = dict(
        loss=loss,
        optimizer=optimizers.adamw(rate, warmup_updates=2),
        frozen=sharding.place(frozen(), on, RULES),
        nfe_per_pair=3.0,
    )
    made = pairs or source(on, batches)
    return StageSpec(name=name, steps=steps, pairs=made, **(options | changes))


def run(folder, specs, on=None, hooks=(), keep=2, profiler=None, write=True, **settings):
    """The stages, with checkpoints and metrics in `folder`."""
    quiet = {"log_every": 2, "checkpoint_every": 3, "progress": False}
    checkpoints = Checkpoints(folder / "checkpoints", keep=Keep(last=keep))
    try:
        return loop.run(
            specs,
            trainable(),
            jax.random.key(1),
            checkpoints=checkpoints,
            writer=MetricsWriter(folder, write=write),
            settings=loop.LoopSettings(**(quiet | settings)),
            mesh=on,
            rules=RULES,
            hooks=hooks,
            profiler=profiler,
        )
    finally:
        checkpoints.close()


def die_at(number, error=KeyboardInterrupt):
    """Batches of prompts of a run that ends while it asks for this one."""

    def batches(r):
        if r == number:
            raise error
        return host_batch(r)

    return batches


def values(tree):
    """Leaves by name on the host, keys as their data."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        sharding.leaf_name(path): np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for path, leaf in flat
    }


def assert_close(left, right, tolerance=0.0):
    """Leaf by leaf; tolerance 0 asks for the same bits."""
    left, right = values(left), values(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=tolerance, atol=tolerance, err_msg=name)
