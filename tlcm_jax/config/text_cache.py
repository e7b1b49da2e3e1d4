"""Embeddings of prompts, made once: then text encoders need not stay on the devices.

They lie in a folder as pairs do (`data.pair_store`), in the dtypes that the encoders make them in,
by the prompt's number: a block of prompts is a "refill".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Int, PyTree

from tlcm_jax.data.pair_store import PairStore
from tlcm_jax.families.base import LatentModel
from tlcm_jax.training import distributed
from tlcm_jax.training.mesh import batch_sharding, check_batch, shard_batch

# Prompts of a block: all devices encode it together.
_BLOCK = 512


class TextCache:
    """What the encoders make of a list of prompts, by number."""

    def __init__(self, store: PairStore, structure: Any):
        self._store, self._structure = store, structure

    def rows(self, indices: Int[np.ndarray, " b"]) -> PyTree[np.ndarray]:
        """The conditioning of prompts, host arrays `[b, ...]`."""
        found = self._store.gather(indices)
        return jax.tree.unflatten(self._structure, [found[name] for name in sorted(found)])


def cache_texts(
    folder: str,
    model: LatentModel,
    prompts: Sequence[str],
    mesh: Mesh,
    resolution: Any,
    contents: Mapping[str, Any],
) -> TextCache:
    """The embeddings of all prompts; those that the folder lacks are made. Every process calls it.

    Args:
      folder: on disk or `gs://`.
      model: with its text encoders on the mesh.
      prompts: the texts.
      mesh: what they are encoded on.
      resolution: of the images, which SDXL is told with its prompts.
      contents: of prompts and teacher (`config.inputs.contents_of`).

    Raises:
      ValueError: the folder holds others, or cannot be used.
    """
    block = min(_BLOCK, -(-len(prompts) // mesh.size) * mesh.size)
    check_batch(mesh, block, f"text_cache = {folder!r}: a block of prompts")
    tokens = model.tokenize(prompts)
    encode = jax.jit(
        lambda params, ids: _named(model.encode_tokens(params, ids, resolution)),
        out_shardings=batch_sharding(mesh),
    )
    processes, share = jax.process_count(), block // jax.process_count()

    def ids_of(number: int) -> PyTree[jax.Array]:
        first = number * block + share * jax.process_index()
        # The last block is filled up with the last prompt.
        rows = np.minimum(np.arange(first, first + share), len(prompts) - 1)
        return shard_batch(mesh, jax.tree.map(lambda x: x[rows], tokens))

    params = model.text_params
    structure = jax.tree.structure(
        jax.eval_shape(lambda p, ids: model.encode_tokens(p, ids, resolution), params, ids_of(0))
    )
    fields = jax.eval_shape(encode, params, ids_of(0))
    blocks = -(-len(prompts) // block)
    described = {"inputs": dict(contents), "resolution": str(resolution)}
    distributed.lead_first(
        lambda: PairStore.create(
            folder, described, refills=blocks, fields=fields, chunk=1, dtype=None
        )
    )
    store = PairStore(folder)
    missing = sorted(set(range(blocks)) - store.done)
    if missing:
        logging.info("encoding %d of %d blocks of %d prompts", len(missing), blocks, block)
    for number in missing:
        store.write(number, *distributed.local_rows(encode(params, ids_of(number))))
        if processes > 1:
            distributed.wait_for_all(f"texts {number}")
        if jax.process_index() == 0:
            store.mark(number)
    return TextCache(store, structure)


def _named(conditioning: PyTree[jax.Array]) -> dict[str, jax.Array]:
    """The leaves by their numbers, whose order is that of the names."""
    return {f"leaf{i:02d}": leaf for i, leaf in enumerate(jax.tree.leaves(conditioning))}
