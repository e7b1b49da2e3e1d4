"""Real pictures for the methods that have some: latents, encoded once, and their captions.

One `.npz` without pickles holds both: `latents` `[n, h, w, c]`, scaled as the model's UNet sees
them, float16 or float32; and `captions` `[n]`. `miniature/encode_latents.py` writes one.
"""

import os
from dataclasses import dataclass

import numpy as np

from tlcm_jax.io.npz_files import read_npz


@dataclass(frozen=True, eq=False)
class LatentSet:
    """Latents and their captions, in the same order.

    Attributes:
      latents: `[n, h, w, c]`.
      captions: n texts.
    """

    latents: np.ndarray
    captions: tuple[str, ...]


def read_latents(path: str | os.PathLike, shape: tuple[int, ...]) -> LatentSet:
    """Reads a file of latents.

    Args:
      path: the `.npz`.
      shape: (h, w, c) that the model's latents have.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no `.npz` of these two arrays, they differ in number, or the latents have
        another shape or are not finite.
    """
    try:
        found = read_npz(path, ("latents", "captions"))
        latents, captions = found["latents"], found["captions"]
    except FileNotFoundError:
        raise FileNotFoundError(f"file of latents {os.fspath(path)} does not exist") from None
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)} is no .npz of `latents` and `captions` ({error})"
        ) from None
    if latents.shape[1:] != shape or not len(latents):
        raise ValueError(
            f"latents of {os.fspath(path)} are {list(latents.shape)}, the model's "
            f"[n, {', '.join(map(str, shape))}]: encode the pictures with this model"
        )
    if captions.shape != (len(latents),) or captions.dtype.kind != "U":
        raise ValueError(
            f"{os.fspath(path)} has {len(latents)} latents and captions {list(captions.shape)} of "
            f"{captions.dtype}: it needs one text each"
        )
    if not np.issubdtype(latents.dtype, np.floating) or not np.all(np.isfinite(latents)):
        raise ValueError(f"latents of {os.fspath(path)} are not all finite numbers")
    return LatentSet(latents, tuple(map(str, captions)))
