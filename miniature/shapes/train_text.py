"""Trains the two CLIP text towers of shapes-xl, from captions alone.

    python -m miniature.shapes.train_text --output DIR --tokenizer miniature/emoji-xl/tokenizer

A linear head reads the caption's spec (each group's number and attributes, relation, style,
ground) from the last token: of the two towers' penultimate states, which the UNet attends to, and
of the pooled embedding. The sum of their cross entropies is the loss. The towers learn with the
hundred or so tokens that the grammar uses; all other rows of the table are zero.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file
from transformers import CLIPTokenizer

from miniature.shapes.captions import WORDINGS, english
from miniature.shapes.scene import (
    ATTRIBUTES,
    GROUNDS,
    RELATIONS,
    RUNGS,
    STYLES,
    TEST_START,
    Spec,
    draw_spec,
)
from miniature.teacher_folder import TEXT_ENCODERS, TOWER
from tlcm_jax.io import names
from tlcm_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from tlcm_jax.training.fit import cosine, fit

# Longest caption: 32 tokens. Attention is causal: later positions cannot change earlier ones.
LENGTH = 32
_GROUPS = 3
_NUMBERS = (0, 1, 2, 3, 4, None)  # 0: the group is not there
HEADS = _GROUPS * (len(_NUMBERS), *(1 + len(v) for v in ATTRIBUTES.values())) + (
    1 + len(RELATIONS), 1 + len(STYLES), 1 + len(GROUNDS))  # fmt: skip


def labels(spec: Spec) -> list[int]:
    """Class of each of `HEADS`: 0 where nothing is said."""
    found = []
    for i in range(_GROUPS):
        group = spec.groups[i] if i < len(spec.groups) else None
        found.append(_NUMBERS.index(group.number) if group else 0)
        for name, values in ATTRIBUTES.items():
            value = getattr(group, name) if group else None
            found.append(1 + values.index(value) if value else 0)
    for value, values in ((spec.relation, RELATIONS), (spec.style, STYLES), (spec.ground, GROUNDS)):
        found.append(1 + values.index(value) if value else 0)
    return found


def corpus(tokenizer: CLIPTokenizer, count: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[n, LENGTH]` and labels `[n, heads]`; a third from the first rung."""
    texts, targets = [], []
    for index in range(start, start + count):
        rung = ("r1", "r3", "full")[index % 3]
        spec = draw_spec(index, RUNGS[rung])
        texts.append(english(spec, index // 3 % WORDINGS))
        targets.append(labels(spec))
    ids = tokenizer(
        texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np"
    )
    return ids["input_ids"], np.asarray(targets)


def batches(ids: np.ndarray, targets: np.ndarray, size: int) -> Iterator[dict]:
    """Endless random batches."""
    rng = np.random.default_rng(0)
    while True:
        rows = rng.integers(len(ids), size=size)
        yield dict(ids=ids[rows], targets=targets[rows])


_CUTS = np.cumsum(HEADS)[:-1]


def cross_entropy(logits: Float[Array, "n heads"], targets: Int[Array, "n _h"]) -> Float[Array, ""]:
    """The mean over captions of the sum over what is read from them."""
    found = [
        jax.nn.log_softmax(part)[jnp.arange(len(part)), targets[:, i]]
        for i, part in enumerate(jnp.split(logits, _CUTS, axis=-1))
    ]
    return -jnp.mean(sum(found))


def share_read(logits: Float[Array, "n heads"], targets: Int[np.ndarray, "n _h"]) -> float:
    """The share of captions whose whole spec is read."""
    parts = np.split(np.asarray(logits), _CUTS, axis=-1)
    right = [np.argmax(part, -1) == targets[:, i] for i, part in enumerate(parts)]
    return float(np.mean(np.all(right, 0)))


def main() -> None:
    """Trains both towers and writes their folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the pipeline folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="vocab.json, merges.txt")
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes-text"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--captions", type=int, default=60000)
    args = parser.parse_args()

    tokenizer = CLIPTokenizer.from_pretrained(str(args.tokenizer), model_max_length=77)
    ids, targets = corpus(tokenizer, args.captions, 0)
    test_ids, test_targets = corpus(tokenizer, 1500, TEST_START)
    used = np.unique(np.concatenate([ids, test_ids]))
    print(f"{len(used)} tokens in use", flush=True)
    config = {
        name: dataclasses.replace(
            CLIPTextConfig.from_dict(raw),
            vocab_size=len(used),
            eos_token_id=int(np.searchsorted(used, TOWER["eos_token_id"])),
        )
        for name, raw in TEXT_ENCODERS.items()
    }
    towers = {name: CLIPTextModel(c) for name, c in config.items()}
    eos = config["text_encoder"].eos_token_id
    compact, test_compact = np.searchsorted(used, ids), np.searchsorted(used, test_ids)
    params = {
        name: tower.init(jax.random.key(i), compact[:1])["params"]
        for i, (name, tower) in enumerate(towers.items())
    }
    width = 2 * TOWER["hidden_size"]
    for name, size in (
        ("states", width),
        ("pooled", TEXT_ENCODERS["text_encoder_2"]["projection_dim"]),
    ):
        params[name] = jnp.zeros((size + 1, sum(HEADS)))

    def logits(params: dict, ids: jax.Array) -> list[jax.Array]:
        first = towers["text_encoder"].apply({"params": params["text_encoder"]}, ids)
        second = towers["text_encoder_2"].apply({"params": params["text_encoder_2"]}, ids)
        last = jnp.argmax(ids == eos, axis=1)
        states = jnp.concatenate([first[0][-2], second[0][-2]], axis=-1)
        states = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        read = (("states", states), ("pooled", second[2]))
        return [x @ params[name][:-1] + params[name][-1] for name, x in read]

    def loss_fn(params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        del key
        metrics = {
            name: cross_entropy(flat, batch["targets"])
            for name, flat in zip(("states", "pooled"), logits(params, batch["ids"]), strict=True)
        }
        return metrics["states"] + metrics["pooled"], metrics

    params = fit(
        loss_fn, params, batches(compact, targets, 128), steps=args.steps,
        learning_rate=cosine(3e-3, args.steps), workdir=args.workdir, ema_decay=0.99,
    )  # fmt: skip
    for name, flat in zip(("states", "pooled"), logits(params, test_compact), strict=True):
        share = share_read(flat, test_targets)
        print(f"{name}: whole spec read from {share:.3f} of unseen captions")
    for name, raw in TEXT_ENCODERS.items():
        tower = params[name]
        embeddings = tower["text_model"]["embeddings"]["token_embedding"]
        table = np.zeros((TOWER["vocab_size"], TOWER["hidden_size"]), np.float32)
        table[used] = embeddings["embedding"]
        embeddings["embedding"] = table
        folder = args.output / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        tensors = {k: v.astype(np.float16) for k, v in names.to_torch(tower).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
