"""Low-rank adapters as their own pytree: W + (alpha / rank) B A (Hu et al., arXiv 2106.09685).

An adapter tree mirrors the base tree's paths; each adapted layer holds `lora_A` (`[in, r]`, or
`[kh, kw, in, r]` for a convolution) and `lora_B` (`[r, out]`, or `[1, 1, r, out]`). The layers
apply factors as they find them; `scaled` puts alpha / rank into them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array

Tree = Mapping

# Where PCM, DMD2 and TLCM put their adapters (docs/method.md).
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
    "time_emb_proj",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """An adapter's shape, and how it is run.

    Attributes:
      rank: r.
      alpha: the update is scaled by alpha / rank.
      targets: names of the adapted layers.
      merged: add the adapter to the weights before each call instead of running its factors
        beside them. The same function; cheaper where the rank is not small against the layers'
        width, at the price of gradients as large as the base.
    """

    rank: int = 64
    alpha: float = 8.0
    targets: tuple[str, ...] = TARGETS
    merged: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(
                f"adapter.rank = {self.rank}, adapter.alpha = {self.alpha}: must be positive"
            )
        if not self.targets:
            raise ValueError("adapter.targets is empty: nothing would be trained; name layers")

    @property
    def scale(self) -> float:
        """The factor alpha / rank of the update."""
        return self.alpha / self.rank


def targeted(path: Sequence[str], targets: Sequence[str]) -> bool:
    """Whether a module's path ends with one of the target names, as PEFT matches them."""
    name = ".".join(path)
    return any(name == target or name.endswith("." + target) for target in targets)


def init(params: Tree, targets: Sequence[str], rank: int, key: Array) -> dict:
    """A fresh adapter: A Kaiming-uniform, B zero, so that it changes nothing yet.

    Args:
      params: the base tree (arrays or shapes).
      targets: module name endings to adapt.
      rank: r.
      key: PRNG key.

    Raises:
      ValueError: the rank is not positive, or a target names no layer of the tree.
    """
    if rank < 1:
        raise ValueError(f"lora rank must be at least 1, got {rank}")
    kernels = {
        path[:-1]: leaf.shape
        for path, leaf in flax.traverse_util.flatten_dict(params).items()
        if path[-1] == "kernel" and targeted(path[:-1], targets)
    }
    unused = [t for t in targets if not any(targeted(path, [t]) for path in kernels)]
    if unused:
        raise ValueError(f"lora targets {unused} name no layer of this network; remove them")
    adapter = {}
    for i, (path, shape) in enumerate(sorted(kernels.items())):
        *spatial, fan, out = shape
        fan_in = fan
        for size in spatial:
            fan_in *= size
        # torch's kaiming_uniform_(a=sqrt(5)), which PEFT uses for A: U(-1/sqrt(fan), 1/sqrt(fan)).
        bound = fan_in**-0.5
        adapter[(*path, "lora_A")] = _uniform(
            jax.random.fold_in(key, i), bound, (*spatial, fan, rank)
        )
        adapter[(*path, "lora_B")] = jnp.zeros((*(1 for _ in spatial), rank, out), jnp.float32)
    return flax.traverse_util.unflatten_dict(adapter)


def _uniform(key: Array, bound: float, shape: tuple[int, ...]) -> Array:
    """U(-bound, bound) of a shape, fp32: the beginning of a draw of the next power of two.

    Which is the same numbers, as an element depends on its key and place alone; but a network's
    many shapes share a few compiled draws.
    """
    count = math.prod(shape)
    flat = _draw(key, bound, 1 << (count - 1).bit_length())
    return _begin(flat, shape)


@functools.partial(jax.jit, static_argnames="count")
def _draw(key: Array, bound: Array, count: int) -> Array:
    return jax.random.uniform(key, (count,), jnp.float32, -bound, bound)


@functools.partial(jax.jit, static_argnames="shape")
def _begin(flat: Array, shape: tuple[int, ...]) -> Array:
    return flat[: math.prod(shape)].reshape(shape)


def scaled(adapter: Tree, scale: float) -> dict:
    """The adapter with `scale` (alpha / rank) multiplied into every `lora_B`."""

    def scale_leaf(path: tuple, leaf: Array) -> Array:
        return leaf * scale if path[-1].key == "lora_B" else leaf

    return jax.tree_util.tree_map_with_path(scale_leaf, adapter)


def merge(params: Tree, adapter: Tree, scale: float = 1.0) -> dict:
    """Base weights with the adapter added: what gradient-free calls and exports use.

    Every product is taken in fp32 and the sum returned in the base's dtype. An adapter may also
    hold leaves under the base's own names, which take their places: all of them, if the base was
    trained whole.

    Raises:
      KeyError: the adapter names a layer that the base does not have.
    """
    base = flax.traverse_util.flatten_dict(params)
    factors = flax.traverse_util.flatten_dict(adapter)
    merged = dict(base)
    for path, down in factors.items():
        if path[-1] == "lora_B":
            continue
        if path[-1] != "lora_A":
            merged[path] = down.astype(base[path].dtype)
            continue
        kernel = base[(*path[:-1], "kernel")]
        up = factors[(*path[:-1], "lora_B")]
        up = up.reshape(up.shape[-2:]).astype(jnp.float32)
        update = scale * (down.astype(jnp.float32) @ up)
        merged[(*path[:-1], "kernel")] = (kernel + update).astype(kernel.dtype)
    return flax.traverse_util.unflatten_dict(merged)
