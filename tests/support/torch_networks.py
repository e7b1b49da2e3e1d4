"""PyTorch twins of our networks: the same random weights in both, arrays to and fro."""

from typing import Any

import flax.linen as nn
import numpy as np
import torch

from tests.support.tiny_pipeline import random_params
from tlcm_jax.families.base import abstract_params
from tlcm_jax.io import names


def twins(network: nn.Module, module: torch.nn.Module, seed: int = 0, prefix: str = "") -> Any:
    """Random weights for `network`, also loaded into `module`, which must want just these.

    Args:
      network: ours.
      module: theirs; changed in place.
      seed: of the weights.
      prefix: what the checkpoint's names begin with and the module's do not.

    Returns:
      The parameter tree.
    """
    params = random_params(abstract_params(network), np.random.default_rng(seed))
    tensors = {
        name.removeprefix(prefix): torch.from_numpy(value)
        for name, value in names.to_torch(params).items()
    }
    module.load_state_dict(tensors, strict=True)
    module.eval()
    return params


def tensor(array: Any, *, images: bool = False, grad: bool = False) -> torch.Tensor:
    """A tensor of an array; images go from NHWC to NCHW."""
    array = np.moveaxis(np.asarray(array), -1, 1) if images else np.asarray(array)
    return torch.from_numpy(np.array(array, order="C")).requires_grad_(grad)


def array(tensor: torch.Tensor, *, images: bool = False) -> np.ndarray:
    """The inverse of `tensor`."""
    array = tensor.detach().numpy()
    return np.moveaxis(array, 1, -1) if images else array


def relative(ours: Any, theirs: Any) -> float:
    """Norm of the difference over the norm of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
