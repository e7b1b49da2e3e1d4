"""One update again: where its NaN comes from."""

import jax
import jax.numpy as jnp
import pytest
import toy_regression as toy

from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.repeat import repeat_update


def rooted(trainable, frozen, pairs, keys, others):
    """The toy's loss, and a root of what is negative where a batch says so."""
    per_sample, metrics = toy.loss(trainable, frozen, pairs, keys, others)
    return per_sample + 0 * jnp.sqrt(pairs["sign"]), metrics


def sample(trainable, frozen, batch, keys):
    pairs = toy.sample(trainable, frozen, batch, keys)
    return {**pairs, "sign": jnp.repeat(batch["conditioning"][:, 0], toy.PATHS)}


def batches(r):
    x = toy.host_batch(r)["conditioning"]
    return {"conditioning": abs(x) if r != 3 else -abs(x)}


def test_the_operation_is_named_and_nothing_written(tmp_path):
    source = toy.source(sample=sample, batches=batches)
    specs = [toy.spec("first", 4, pairs=source, loss=rooted), toy.spec("second", 4, pairs=source)]
    whole = toy.run(tmp_path, [toy.spec("first", 3, pairs=source, loss=rooted)], log_every=1)
    assert whole.position.total == 3
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=None)

    def look(number, specs=specs):
        return repeat_update(
            specs, toy.trainable(), jax.random.key(1), number, checkpoints=checkpoints
        )

    longer = [toy.spec("first", 9, pairs=source, loss=rooted)]
    said = look(7, longer)
    assert said.startswith("update 7: ") and "nan" in said and "sqrt" in said
    assert "update 6: no operation gave a NaN" in look(6)  # of the next stage
    with pytest.raises(ValueError, match="update 3 lies before the newest checkpoint, of step 3"):
        look(3)
    with pytest.raises(ValueError, match="the run has 8 updates, and no 9"):
        look(9)
