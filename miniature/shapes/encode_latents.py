"""Encodes renders once, for the related methods that learn from real pictures.

    python -m miniature.shapes.encode_latents --codec DIR/codec.npz --scaling-factor 0.17 \\
        --output miniature/shapes/latents.npz

Training scenes of the rung and a caption of each, in the latents of the world's codec; captions
that are kept from distillation are passed over. `tlcm_jax.data.latents` reads the file.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

from miniature.shapes.captions import WORDINGS, english
from miniature.shapes.codec import LinearCodec, centred
from miniature.shapes.prompts import held_text
from miniature.shapes.render import render
from miniature.shapes.scene import RUNGS, Rung, draw_scene, draw_spec


def encode(codec: LinearCodec, scaling_factor: float, rung: Rung, count: int) -> dict:
    """The first `count` scenes: float16 `latents` `[n, 8, 8, 24]` and `captions` `[n]`."""
    latents, captions = [], []
    for index in itertools.count():
        if len(captions) == count:
            break
        spec = draw_spec(index, rung)
        text = english(spec, index % WORDINGS)
        if not held_text(text):
            picture = render(draw_scene(spec, index, rung))
            scaled = scaling_factor * codec.encode(centred(picture[None]))[0]
            latents.append(scaled.astype(np.float16))
            captions.append(text)
    return dict(latents=np.stack(latents), captions=np.array(captions))


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--scaling-factor", type=float, required=True, help="of the latents")
    parser.add_argument("--output", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--rung", choices=RUNGS, default="r1")
    parser.add_argument("--count", type=int, default=10000)
    args = parser.parse_args()
    codec = LinearCodec.load(args.codec)
    encoded = encode(codec, args.scaling_factor, RUNGS[args.rung], args.count)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output, **encoded)
    print(f"{len(encoded['captions'])} latents of {list(encoded['latents'].shape[1:])}")


if __name__ == "__main__":
    main()
