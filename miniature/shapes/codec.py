"""The linear f8 codec that the world's latents are, and its exact form as an `AutoencoderKL`.

    python -m miniature.shapes.codec --output DIR      # writes DIR/codec.npz, a minute

A picture x in -1..1 is cut into 8 x 8 blocks of 192 numbers. With the blocks' mean m, the 24 first
principal directions V and one gain a channel,

    latent = (x - m) V diag(g),     g_c = a e_c^(-1/4)                          (1)

where e_c is the energy that one object has in channel c: the gains even out the coarse channels,
which hold place and colour, and the fine ones, which hold the shape. `a` gives the latents unit
deviation; `scaling_factor` belongs to the pipeline.

Weights are rounded to fp16 here, once, so that a folder of fp16 weights holds exactly this codec.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float

from miniature.shapes import render
from miniature.shapes.scene import RUNGS, SIDE, draw_scene, draw_spec

CHANNELS = 24
FACTOR = 8
_PICTURES = 6000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCodec:
    """Equation (1) as one affine map a block.

    Attributes:
      weight: `[192, 24]`, pixel order (row, column, channel), fp16 values in fp32.
      bias: `[24]`.
      inverse: `[24, 192]`, the least-squares way back.
      mean: `[192]` of the blocks, added by `decode`.
    """

    weight: Float[np.ndarray, "192 24"]
    bias: Float[np.ndarray, "24"]
    inverse: Float[np.ndarray, "24 192"]
    mean: Float[np.ndarray, "192"]

    def encode(self, images: Float[np.ndarray, "b 64 64 3"]) -> Float[np.ndarray, "b 8 8 24"]:
        """Latents, not yet scaled, of pictures in -1..1."""
        return blocks(images) @ self.weight + self.bias

    def decode(self, latents: Float[np.ndarray, "b 8 8 24"]) -> Float[np.ndarray, "b 64 64 3"]:
        """Pictures in -1..1 of unscaled latents: the nearest that the 24 directions hold."""
        cut = latents @ self.inverse + self.mean
        side = latents.shape[1]
        grid = cut.reshape(len(cut), side, side, FACTOR, FACTOR, 3).transpose(0, 1, 3, 2, 4, 5)
        return np.clip(grid.reshape(len(cut), side * FACTOR, side * FACTOR, 3), -1, 1)

    def save(self, path: Path) -> None:
        """Writes one `.npz`."""
        np.savez(path, **dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "LinearCodec":
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as data:
            return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})


def blocks(images: Float[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b h8 w8 192"]:
    """Pictures cut into 8 x 8 blocks."""
    side = images.shape[1] // FACTOR
    grid = images.reshape(len(images), side, FACTOR, side, FACTOR, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), side, side, -1)


def centred(images: np.ndarray) -> Float[np.ndarray, "b 64 64 3"]:
    """uint8 pictures in -1..1."""
    return images.astype(np.float32) / np.float32(127.5) - 1


def object_differences(count: int, start: int = 0) -> Float[np.ndarray, "n 64 64 3"]:
    """Single objects of the first rung, each the picture less its own background."""
    rung, found = RUNGS["r1"], []
    for index in range(start, start + count):
        scene = draw_scene(draw_spec(index, rung), index, rung)
        empty = render.render(dataclasses.replace(scene, things=()))
        found.append(centred(render.render(scene)) - centred(empty))
    return np.stack(found)


def fit_linear(pictures: int = _PICTURES) -> LinearCodec:
    """Principal directions of pictures from the plain and the full world, half each."""
    half = pictures // 2
    images = [render.picture(i, RUNGS["r3"]) for i in range(half)]
    images += [render.picture(half + i, RUNGS["full"]) for i in range(half)]
    cut = blocks(centred(np.stack(images))).reshape(-1, FACTOR**2 * 3)
    mean = cut.mean(0)
    _, directions = np.linalg.eigh(np.cov((cut - mean).T))
    directions = directions[:, ::-1][:, :CHANNELS]
    # The sign of an eigenvector is the solver's whim: the largest entry is made positive.
    largest = np.abs(directions).argmax(0)
    directions = directions * np.sign(directions[largest, np.arange(CHANNELS)])
    energy = ((blocks(object_differences(400)) @ directions) ** 2).sum((1, 2)).mean(0)
    gain = energy**-0.25
    gain /= np.std((cut - mean) @ (directions * gain))
    weight = (directions * gain).astype(np.float16).astype(np.float32)
    bias = -(mean @ weight).astype(np.float16).astype(np.float32)
    inverse = np.linalg.pinv(weight.astype(np.float64))
    # The rounded bias moves the origin a little: the mean that goes with it.
    origin = mean - (mean @ weight + bias) @ inverse
    return LinearCodec(
        weight=weight,
        bias=bias,
        inverse=inverse.astype(np.float32),
        mean=origin.astype(np.float32),
    )


def main() -> None:
    """Fits, reports and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    codec = fit_linear()
    args.output.mkdir(parents=True, exist_ok=True)
    codec.save(args.output / "codec.npz")
    for name in ("r1", "full"):
        images = np.stack([render.picture(2**31 + i, RUNGS[name]) for i in range(200)])
        error = (codec.decode(codec.encode(centred(images))) - centred(images)) / 2
        psnr = -10 * np.log10((error**2).mean((1, 2, 3)))
        print(f"{name}: {SIDE} px to {SIDE // FACTOR} x {SIDE // FACTOR} x {CHANNELS},"
              f" {psnr.mean():.1f} dB")  # fmt: skip
    energy = ((blocks(object_differences(400, 2**31)) @ codec.weight) ** 2).sum((1, 2, 3))
    print("energy of an object, unscaled, 5 25 50 75 95 %:",
          np.quantile(energy, [0.05, 0.25, 0.5, 0.75, 0.95]).round(1).tolist())  # fmt: skip


if __name__ == "__main__":
    main()
