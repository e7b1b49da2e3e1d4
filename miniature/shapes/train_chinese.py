"""Trains a small Chinese text tower on the grammar's captions, and writes pairs for its adapter.

    python -m miniature.shapes.train_chinese --output DIR/zh-tower
    python -m tlcm_jax.train_text_adapter --model miniature/shapes-xl --lora STUDENT \\
        --text_encoder DIR/zh-tower --pairs DIR/zh-tower/pairs.tsv --hidden_width 256 \\
        --learning_rate 1e-3 --output DIR/zh

The tower is Chinese-CLIP's, a BERT, of two layers on the grammar's characters. As in `train_text`
linear heads read the caption's spec: from the first token's state, and from the states' mean, which
the adapter's pooled output is made of. pairs.tsv holds each caption of the rung in English and in
Chinese. Neither the tower nor the pairs see a text of `prompts/RUNG/chinese.txt`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from miniature.shapes.captions import WORDINGS, chinese, english
from miniature.shapes.prompts import held_text, prompt_sets, spec_of
from miniature.shapes.scene import RUNGS, TEST_START, Rung, draw_spec
from miniature.shapes.train_text import HEADS, batches, cross_entropy, labels, share_read
from tlcm_jax.data.tokens import clip_ids, read_bert_tokenizer
from tlcm_jax.families.text_adapter import LENGTH
from tlcm_jax.io import names
from tlcm_jax.io.json_files import write_json
from tlcm_jax.models.chinese_clip import ChineseCLIPTextConfig, ChineseCLIPTextModel
from tlcm_jax.training.fit import cosine, fit

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CORPUS = ("r1", "r3", "full")
_TEST = 3000


def characters() -> list[str]:
    """What the grammar writes with, sorted."""
    drawn = (chinese(draw_spec(i, RUNGS["full"]), i % WORDINGS) for i in range(5000))
    return sorted({character for text in drawn for character in text})


def held_chinese(rung: Rung) -> set[str]:
    """The texts of `chinese.txt`."""
    entries = prompt_sets(rung)["test"]
    return {chinese(spec_of(entry), i % WORDINGS) for i, entry in enumerate(entries)}


def pairs(rung: Rung, count: int = 6000) -> list[tuple[str, str]]:
    """Captions in both languages, of training scenes, none of them held out in either."""
    held, found = held_chinese(rung), {}
    for index in range(count):
        spec = draw_spec(index, rung)
        both = english(spec, index % WORDINGS), chinese(spec, index % WORDINGS)
        if not held_text(both[0]) and both[1] not in held:
            found[both] = None
    return list(found)


def corpus(count: int, start: int, held: set[str]) -> tuple[list[str], np.ndarray]:
    """Captions, a third of them of the first rung, and their labels `[n, heads]`."""
    texts, targets = [], []
    for index in range(start, start + count):
        spec = draw_spec(index, RUNGS[_CORPUS[index % 3]])
        text = chinese(spec, index // 3 % WORDINGS)
        if text not in held:
            texts.append(text)
            targets.append(labels(spec))
    return texts, np.asarray(targets)


def config(words: Sequence[str]) -> dict:
    """The tower's `text_config`."""
    return {
        "model_type": "chinese_clip_text_model",
        "hidden_size": 48,
        "intermediate_size": 192,
        "max_position_embeddings": LENGTH,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "type_vocab_size": 2,
        "vocab_size": len(words),
    }


def main() -> None:
    """Trains the tower and writes its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes-chinese"))
    parser.add_argument("--rung", choices=RUNGS, default="r1", help="of the pairs")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--captions", type=int, default=30000)
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    held = held_chinese(RUNGS[args.rung])
    words = [*_SPECIAL, *characters()]
    (args.output / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    lines = [f"{one}\t{other}\n" for one, other in pairs(RUNGS[args.rung])]
    (args.output / "pairs.tsv").write_text("".join(lines), encoding="utf-8")
    print(f"{len(words)} words, {len(lines)} pairs", flush=True)

    tokenizer = read_bert_tokenizer(args.output / "vocab.txt", len(words))
    texts, targets = corpus(args.captions, 0, held)
    ids = clip_ids(tokenizer, texts, LENGTH)
    test_texts, test_targets = corpus(_TEST, TEST_START, set())
    test_ids = clip_ids(tokenizer, test_texts, LENGTH)

    raw = config(words)
    tower = ChineseCLIPTextModel(ChineseCLIPTextConfig.from_dict(raw))
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"tower": tower.init(keys[0], ids[:1])["params"]}
    for name, key in zip(("first", "mean"), keys[1:], strict=True):
        params[name] = 0.02 * jax.random.normal(key, (raw["hidden_size"] + 1, sum(HEADS)))

    def logits(params: dict, ids: jax.Array) -> list[jax.Array]:
        states = tower.apply({"params": params["tower"]}, ids)
        read = (("first", states[:, 0]), ("mean", jnp.mean(states, axis=1)))
        return [x @ params[name][:-1] + params[name][-1] for name, x in read]

    def loss_fn(params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        del key
        metrics = {
            name: cross_entropy(flat, batch["targets"])
            for name, flat in zip(("first", "mean"), logits(params, batch["ids"]), strict=True)
        }
        return metrics["first"] + metrics["mean"], metrics

    params = fit(
        loss_fn, params, batches(ids, targets, 128), steps=args.steps,
        learning_rate=cosine(3e-3, args.steps, min(100, args.steps // 2)), workdir=args.workdir,
        ema_decay=0.99,
    )  # fmt: skip
    for name, flat in zip(("first", "mean"), jax.jit(logits)(params, test_ids), strict=True):
        share = share_read(flat, test_targets)
        print(f"{name}: whole spec read from {share:.3f} of the test scenes' captions")
    write_json(args.output / "config.json", {"model_type": "chinese_clip", "text_config": raw})
    tensors = {
        f"text_model.{k}": np.ascontiguousarray(v, np.float16)
        for k, v in names.to_torch(params["tower"]).items()
    }
    save_file(tensors, args.output / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
