"""Images and texts that scorers are compared on: odd sizes, 1 to 100 tokens, awkward spelling."""

import gzip
import json
from pathlib import Path

import numpy as np

SIZES = ((61, 97), (57, 56), (133, 71), (56, 56), (97, 61), (301, 199), (64, 120), (59, 56))
TEXTS = (
    "cat",
    "a photo of a cat &amp; a dog",
    "“Curly quotes”, Straße, naïve café № 5",
    "schÃ¶n",  # a broken encoding
    "  two   spaces\tand a tab\n",
    "日本語の看板 in 3 colours!!",
    "it's the dog's 2nd ball, isn't it?",
    " ".join(["red", "green", "blue", "wooden"] * 25),  # 100 tokens
)


def odd_images(seed: int = 0) -> list[np.ndarray]:
    """One uint8 image of each of `SIZES`: smooth colours under noise."""
    random = np.random.default_rng(seed)
    images = []
    for height, width in SIZES:
        rows, columns = np.mgrid[0:height, 0:width]
        phase = random.uniform(0, 6, 3)
        waves = np.sin(rows[..., None] / 17 + phase) * np.cos(columns[..., None] / 11 + phase)
        noise = random.normal(0, 30, (height, width, 3))
        images.append(np.clip(128 + 90 * waves + noise, 0, 255).astype(np.uint8))
    return images


def write_clip_vocabulary(folder: Path) -> Path:
    """Writes CLIP's own vocabulary, which open_clip's wheel holds, as transformers reads it."""
    import open_clip

    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    theirs = open_clip.tokenizer.SimpleTokenizer()
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {named.get(token, token): i for token, i in theirs.encoder.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    return folder
