"""Readers of what lies beside models: prompts, recipes, rows, scorers, arrays, images."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks.fuzz.targets import Target
from tests.support.scorer_files import write_clip, write_image_reward, write_network
from tlcm_jax.config.schema import read as read_recipe
from tlcm_jax.data.latents import read_latents
from tlcm_jax.data.prompt_sets import read_prompt_set
from tlcm_jax.data.prompts import read_prompts
from tlcm_jax.evaluation.scorers import feature_distance, image_reward
from tlcm_jax.io import names
from tlcm_jax.io.clip_files import load_clip, read_clip_config
from tlcm_jax.io.json_files import read_object, write_json
from tlcm_jax.io.latent_lpips_files import load_latent_lpips
from tlcm_jax.io.npz_files import read_npy
from tlcm_jax.io.placement import to_host
from tlcm_jax.io.scorer_files import Published
from tlcm_jax.io.tensors import TensorFile
from tlcm_jax.models.aesthetic import LinearChain
from tlcm_jax.paths import ROOT
from tlcm_jax.training.metrics import MetricsWriter

_CLIP = Published(files=("open_clip_model", "model"), origin="nowhere")


def texts(folder: Path) -> Iterator[Target]:
    """Prompts, recipes, rows."""
    where = folder / "prompts"
    where.mkdir()
    rows = [{"prompt": text, "label": f"l{i}"} for i, text in enumerate(("a cat", "a red dog"))]
    contents = {
        "a.txt": "# source\na cat\na red dog\n",
        "a.csv": 'image,prompt\n1.png,"a cat, red"\n2.png,a dog\n',
        "a.jsonl": "\n".join(map(json.dumps, rows)) + "\n",
        "beside.txt": "a cat\na red dog\n",
        "beside.json": json.dumps(rows),
        "coco.json": json.dumps({"annotations": [{"image_id": i, "caption": "a"} for i in (2, 1)]}),
    }
    for name, content in contents.items():
        (where / name).write_text(content)
    for name, kind in (("a.txt", "lines"), ("a.csv", "lines"), ("a.jsonl", "lines")):
        yield Target(
            name=f"prompts {name[2:]}", file=where / name, kind=kind, weight=2,
            read=lambda _, path=where / name: read_prompts([path]),
        )  # fmt: skip
    for name, asked in (("beside.json", "beside.txt"), ("coco.json", "coco.json")):
        yield Target(
            name=f"prompts {name}", file=where / name, kind="json", weight=2,
            read=lambda _, path=where / asked: read_prompt_set(path),
        )  # fmt: skip
    recipe = folder / "run" / "config.json"
    recipe.parent.mkdir()
    write_json(
        recipe,
        {
            "name": "x", "seed": 0, "model": {"path": "m", "resolution": 64}, "prompts": ["p.txt"],
            "adapter": {"rank": 2, "alpha": 8.0, "targets": ["to_q"]}, "mesh": {"data": -1},
            "stages": {"a": {
                "objective": "mlcd", "steps": 2, "batch_size": 4, "learning_rate": 1e-4,
                "settings": {"guidance_scale": 5.0, "segments": 8},
                "terms": {"adversarial": {"weight": 0.1}},
            }},
        },
    )  # fmt: skip
    yield Target(
        name="recipe", file=recipe, kind="json", weight=3,
        read=lambda _: read_recipe(read_object(recipe, "workdir")),
    )  # fmt: skip
    metrics = folder / "metrics" / "metrics.jsonl"
    metrics.parent.mkdir()
    lines = [{"stage": "a", "step": i, "loss": 0.5, "steps": 1} for i in range(1, 6)]
    metrics.write_text("\n".join(map(json.dumps, lines)) + "\n")
    yield Target(
        name="metrics", file=metrics, kind="lines", weight=2,
        read=lambda _: MetricsWriter(metrics.parent).resume(3),
    )  # fmt: skip


def scorers(folder: Path) -> Iterator[Target]:
    """Scorers: configs, sizes, weights, vocabularies."""
    for dialect, config in (
        ("open_clip", "open_clip_config.json"),
        ("transformers", "config.json"),
    ):
        where = folder / f"clip-{dialect}"
        write_clip(where, dialect=dialect)
        yield Target(
            name=f"CLIP config, {dialect}", file=where / config, kind="json",
            read=lambda _, where=where: read_clip_config(where),
        )  # fmt: skip
    where = folder / "clip-open_clip"
    yield Target(
        name="CLIP weights", file=where / "open_clip_model.safetensors", kind="safetensors",
        read=lambda _: load_clip("clip", where, "ViT-g-14", _CLIP), weight=0.1,
    )  # fmt: skip
    head = folder / "head" / "head.safetensors"
    head.parent.mkdir()
    write_network(head, LinearChain(), jax.ShapeDtypeStruct((1, 24), np.float32))
    shapes = jax.eval_shape(
        LinearChain().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 24), np.float32)
    )["params"]

    def read_head(_: Any) -> None:
        tensors = TensorFile([head])
        to_host(names.match_tensors(tensors, shapes, "x"), shapes, tensors.release)

    yield Target(name="scorer's weights", file=head, kind="safetensors", read=read_head)
    reward = folder / "reward"
    write_image_reward(reward)
    yield Target(
        name="ImageReward's sizes", file=reward / "ImageReward.safetensors", kind="safetensors",
        read=lambda _: image_reward._config("x", TensorFile([reward / "ImageReward.safetensors"])),
    )  # fmt: skip
    yield Target(
        name="BERT's vocabulary", file=reward / "vocab.txt", kind="lines",
        read=lambda _: image_reward._tokenizer(reward, 57), weight=0.5,
    )  # fmt: skip
    for name, files, read in (
        ("latent_lpips", ("config.json", "latent_lpips.safetensors"), load_latent_lpips),
        ("scorer", ("scorer.json", "scorer.safetensors"), _contrastive),
        ("judge", ("judge.json", "judge.safetensors"), _judge),
    ):
        copy = folder / f"miniature-{name}"
        shutil.copytree(ROOT / "miniature" / name, copy)
        for file in files:
            kind = "json" if file.endswith(".json") else "safetensors"
            yield Target(
                name=f"miniature's {file}", file=copy / file, kind=kind, weight=0.05,
                read=lambda _, copy=copy, read=read: read(copy),
            )  # fmt: skip


def _contrastive(folder: Path) -> Any:
    from miniature.contrastive import ContrastiveScorer

    return ContrastiveScorer.load(folder)


def _judge(folder: Path) -> Any:
    from miniature import judge

    return judge._load(folder)


def arrays(folder: Path) -> Iterator[Target]:
    """Arrays and images."""
    where = folder / "arrays"
    where.mkdir()
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    np.savez(where / "latents.npz", latents=latents, captions=np.array(["a cat", "a dog"]))
    yield Target(
        name="latents", file=where / "latents.npz", kind="npz", weight=3,
        read=lambda _: read_latents(where / "latents.npz", (4, 4, 4)),
    )  # fmt: skip
    np.savez_compressed(where / "real.npz", mu=np.zeros(4), sigma=np.eye(4))
    yield Target(
        name="statistics", file=where / "real.npz", kind="npz", weight=2,
        read=lambda _: feature_distance._read_statistics(where / "real.npz"),
    )  # fmt: skip
    np.save(where / "verdict.npy", np.ones(1, np.float32))
    yield Target(
        name="verdicts", file=where / "verdict.npy", kind="npy",
        read=lambda _: read_npy(where / "verdict.npy"),
    )  # fmt: skip
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(where / "image.png")
    yield Target(
        name="images", file=where / "image.png", kind="bytes",
        read=lambda _: feature_distance._read_image(where / "image.png"),
    )  # fmt: skip
