"""Scores of the student's own samples, made on the host when the samples are.

For the terms that ask for it (`Term.scores_samples`): a refill's samples are decoded on the
devices, each process fetches and scores its own rows, and what a term makes of the scores of all
(`Term.weigh`) joins what it reads.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, UInt8

from tlcm_jax.distillation.networks import Frozen
from tlcm_jax.distillation.objective import Pairs, repeat
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.training.mesh import batch_sharding, shard_batch, traced_on


def sample_scores(
    loss: StageLoss, mesh: Mesh, rows: int
) -> Callable[[Frozen, Pairs], Pairs] | None:
    """What the host adds to a refill (`training.pairs.PairSource.annotate`); None if nothing.

    Args:
      loss: of the stage.
      mesh: what the pairs lie on.
      rows: images that are decoded at once; divides a refill's prompts.
    """
    terms = {name: term for name, term in loss.terms.items() if term.scores_samples}
    decode, each = loss.objective.networks.decode, loss.objective.pairs_per_prompt
    if not terms:
        return None
    if decode is None:
        raise ValueError(f"{', '.join(terms)} needs a decoder, and the model has none")

    @partial(jax.jit, out_shardings=batch_sharding(mesh))
    @partial(traced_on, mesh)
    def images_of(
        frozen: Frozen, latents: Float[Array, " n *latent"]
    ) -> UInt8[Array, "prompts h w 3"]:
        latents = latents[::each]  # the pairs of a prompt share their sample
        # As `training.update` cuts a batch: neighbours stay on their device.
        parts = jnp.moveaxis(latents.reshape(rows, -1, *latents.shape[1:]), 1, 0)
        images = jnp.moveaxis(jax.lax.map(decode(frozen), parts), 0, 1)
        images = images.reshape(len(latents), *images.shape[2:]).astype(jnp.float32)
        return jnp.round(255 * images).astype(jnp.uint8)

    @partial(jax.jit, out_shardings=batch_sharding(mesh))
    def of_prompts(inputs: PyTree[Array]) -> PyTree[Array]:
        return jax.tree.map(lambda x: x[::each], inputs)

    weigh = {
        name: jax.jit(
            lambda scores, term=term: repeat(term.weigh(scores), each),
            out_shardings=batch_sharding(mesh),
        )
        for name, term in terms.items()
    }

    def annotate(frozen: Frozen, pairs: Pairs) -> Pairs:
        images = local_rows(images_of(frozen, pairs.sample))
        inputs = dict(pairs.inputs)
        for name, term in terms.items():
            read = jax.tree.map(local_rows, of_prompts(inputs[name]))
            scores = shard_batch(mesh, term.score_samples(images, read))
            inputs[name] = weigh[name](scores)
        return pairs._replace(inputs=inputs)

    return annotate


def local_rows(array: Array) -> np.ndarray:
    """Rows of an array that lie on this process, in their order, on the host."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
