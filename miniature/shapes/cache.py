"""Renders, encodes and captions scenes ahead of the UNet's training.

    python -m miniature.shapes.cache --rung r1 --count 100000 --codec DIR/codec.npz \\
        --tokenizer miniature/emoji-xl/tokenizer --output DIR/cache-r1

Writes shards of 10 000 scenes, `00000.npz` and on; shards that are there are kept, so the same
command with a larger `--count` only adds.

    latents  float16 [n, 8, 8, 24], unscaled
    ids      uint16 [n, 3, 77], one caption in each wording, padded as CLIP-L pads
"""

import argparse
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from miniature.shapes.captions import WORDINGS, english
from miniature.shapes.codec import LinearCodec, centred
from miniature.shapes.render import render
from miniature.shapes.scene import RUNGS, draw_scene, draw_spec

SHARD = 10000


def shard(number: int, rung: str, codec: LinearCodec, tokenizer: CLIPTokenizer) -> dict:
    """The arrays of one shard."""
    latents, texts = [], []
    for index in range(number * SHARD, (number + 1) * SHARD):
        spec = draw_spec(index, RUNGS[rung])
        picture = render(draw_scene(spec, index, RUNGS[rung]))
        latents.append(codec.encode(centred(picture[None]))[0].astype(np.float16))
        texts += [english(spec, wording) for wording in range(WORDINGS)]
    ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="np")["input_ids"]
    return dict(latents=np.stack(latents), ids=ids.reshape(SHARD, WORDINGS, 77).astype(np.uint16))


def load(folder: Path) -> dict[str, np.ndarray]:
    """All shards that are there, joined."""
    files = sorted(folder.glob("[0-9][0-9][0-9][0-9][0-9].npz"))
    if not files:
        raise FileNotFoundError(f"{folder}: holds no shards; run miniature.shapes.cache first")
    parts = [np.load(file) for file in files]
    return {name: np.concatenate([part[name] for part in parts]) for name in ("latents", "ids")}


def main() -> None:
    """Writes the shards that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rung", choices=RUNGS, required=True)
    parser.add_argument("--count", type=int, default=100000)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    codec = LinearCodec.load(args.codec)
    tokenizer = CLIPTokenizer.from_pretrained(str(args.tokenizer), model_max_length=77)
    args.output.mkdir(parents=True, exist_ok=True)
    for number in range(args.count // SHARD):
        path = args.output / f"{number:05}.npz"
        if not path.exists():
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **shard(number, args.rung, codec, tokenizer))
            partial.rename(path)
            print(path, flush=True)


if __name__ == "__main__":
    main()
