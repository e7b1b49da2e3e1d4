"""A state as its leaves by name: how a checkpoint holds it, and compares it with another."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from tlcm_jax.training.sharding import leaf_name
from tlcm_jax.training.state import TrainState


def flatten(state: TrainState) -> dict[str, Any]:
    """Leaves by name; the key as its data, and shapes as `jax.ShapeDtypeStruct`s."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = leaf_name(path)
        if name in flat:
            raise ValueError(f"two leaves of the state are called {name!r}: rename one")
        flat[name] = _key_data(leaf) if _is_key(leaf) else leaf
    return flat


def unflatten(template: TrainState, leaves: dict[str, Any]) -> TrainState:
    """The state that `flatten` took apart, keys as the template has them."""

    def pick(path: tuple, leaf: Any) -> Any:
        value = leaves[leaf_name(path)]
        if not _is_key(leaf):
            return value
        return jax.random.wrap_key_data(value, impl=_key_impl(leaf))

    return jax.tree_util.tree_map_with_path(pick, template)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _key_impl(leaf: Any) -> Any:
    # Asked of a tracer: only keys that are arrays have an implementation to ask for.
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def compare(wanted: dict[str, Any], stored: dict[str, Any], path: Path) -> None:
    """Refuses a checkpoint of other leaves than wanted, naming them."""
    problems = [f"{name}: not in the checkpoint" for name in sorted(set(wanted) - set(stored))]
    problems += [f"{name}: only in the checkpoint" for name in sorted(set(stored) - set(wanted))]
    for name in sorted(set(wanted) & set(stored)):
        here = (tuple(wanted[name].shape), np.dtype(wanted[name].dtype))
        there = (tuple(stored[name].shape), np.dtype(stored[name].dtype))
        if here != there:
            problems.append(
                f"{name}: {there[1]}{list(there[0])} in the checkpoint, {here[1]}{list(here[0])} "
                f"in this run"
            )
    if problems:
        shown = "".join(f"\n  {line}" for line in problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"checkpoint {path} does not fit this run's state; use the config it was made with, "
            f"or another workdir:{shown}{more}"
        )
