"""Encodes the teacher's own training pictures once, for methods that learn from real ones.

    python -m miniature.encode_latents --data emoji32.npz --model miniature/emoji-xl \
        --output miniature/latents.npz

One latent and one caption a pair, with the wording it has in `prompts/train.txt`. Left out are the
pairs that the teacher never saw, and those whose captions are kept for evaluation.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from miniature.captions import wording
from tlcm_jax.data.batches import whole_batches
from tlcm_jax.families.load import load_model
from tlcm_jax.families.stable_diffusion import StableDiffusion


def encode(
    pipeline: StableDiffusion, data: Mapping[str, np.ndarray], batch: int = 64
) -> dict[str, np.ndarray]:
    """Latents and captions, as `tlcm_jax.data.latents` reads them.

    Args:
      pipeline: whose autoencoder it is.
      data: the arrays of `miniature.emoji`.
      batch: pictures at a time.
    """
    rows = np.flatnonzero(~(data["composition"] | data["heldout"]))
    run = jax.jit(pipeline.encode_images)
    parts = [
        np.asarray(run(data["images"][rows[places]] / np.float32(255)), np.float16)
        for places in whole_batches(len(rows), batch)
    ]
    hexcodes = data["class_hexcodes"][data["class_ids"][rows]]
    styles = data["style_names"][data["style_ids"][rows]]
    columns = [wording(str(h), str(s)) for h, s in zip(hexcodes, styles, strict=True)]
    return {
        "latents": np.concatenate(parts)[: len(rows)],
        "captions": data["captions"][rows, columns],
    }


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="emoji32.npz")
    parser.add_argument("--model", type=Path, required=True, help="the teacher's folder")
    parser.add_argument("--output", type=Path, required=True, help="the .npz to write")
    args = parser.parse_args()
    with np.load(args.data) as file:
        data = {name: file[name] for name in file.files}
    encoded = encode(load_model(args.model), data)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output, **encoded)
    print(f"{len(encoded['captions'])} latents of {list(encoded['latents'].shape[1:])}")


if __name__ == "__main__":
    main()
