"""BAPPS, people's rankings of changed pictures, as its release lays it out (arXiv 1801.03924).

Below a folder, for every kind of change: `ref`, `p0` and `p1` with pictures of the same names, and
`judge` with the share of judges who found p1 closer, one `.npy` each.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from tlcm_jax.io.npz_files import read_npy


def bapps_triplets(
    folder: str | Path,
    encode: Callable[[Float[Array, "b h w 3"]], Float[Array, "b h w c"]],
    size: int,
    seed: int,
) -> Iterator[dict[str, Array]]:
    """Endless batches of triplets and people's verdicts, as `distillation.ranking` reads them.

    Args:
      folder: any folder of the release, such as `2afc/train`.
      encode: pictures in 0..1 to latents.
      size: of a batch.
      seed: of the choice of triplets.

    Raises:
      FileNotFoundError: there are none, or a triplet lacks a part.
    """
    files = sorted(path for path in Path(folder).rglob("*.png") if path.parent.name == "ref")
    if not files:
        raise FileNotFoundError(f"{folder} holds no BAPPS triplets (ref/*.png, p0, p1, judge)")
    for file in files:
        for part in _parts(file).values():
            if not part.is_file():
                raise FileNotFoundError(f"{part} is missing beside {file}; unpack BAPPS again")
    return _batches(files, jax.jit(encode), size, seed)


def _parts(file: Path) -> dict[str, Path]:
    kind = file.parents[1]
    return {
        "reference": file,
        "first": kind / "p0" / file.name,
        "second": kind / "p1" / file.name,
        "verdict": kind / "judge" / f"{file.stem}.npy",
    }


def _batches(files: list[Path], encode: Callable, size: int, seed: int) -> Iterator[dict]:
    rng = np.random.default_rng(seed)
    while True:
        chosen = [_parts(files[i]) for i in rng.integers(len(files), size=size)]
        batch = {
            part: encode(np.stack([_picture(each[part]) for each in chosen]))
            for part in ("reference", "first", "second")
        }
        verdicts = [read_npy(each["verdict"]).mean() for each in chosen]
        yield {**batch, "verdict": jnp.asarray(verdicts, jnp.float32)}


def _picture(file: Path) -> Float[np.ndarray, "h w 3"]:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), np.float32) / 255
