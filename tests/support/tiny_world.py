"""All that a recipe with every term names, tiny and random: a teacher, scorers, latent LPIPS."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from miniature.contrastive import ContrastiveNetwork, ContrastiveScorer, words
from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax.io.latent_lpips_files import save_latent_lpips
from tlcm_jax.models.latent_lpips import LatentLPIPS

PROMPTS = ("a red cat", "a cat icon", "an icon of a cat")
CAPTIONS = ("a red cat", "a cat icon", "an icon of a cat", "a red icon of a cat", "a cat")


def write_tiny_world(folder: Path) -> Path:
    """`teacher`, `prompts.txt`, `latents.npz`, `scorer`, `held_out` and `lpips` in a folder."""
    write_tiny_pipeline(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    latents = np.random.default_rng(0).normal(size=(5, 8, 8, 4)).astype(np.float16)
    np.savez(folder / "latents.npz", latents=latents, captions=np.array(CAPTIONS))
    network = ContrastiveNetwork(widths=(8,), features=8, resolution=8)
    for i, name in enumerate(("scorer", "held_out")):
        blank = jnp.zeros((1, 8, 8, 3))
        params = jax.jit(network.init)(jax.random.key(i), blank, words(["a"]))["params"]
        params["words"]["embedding"] = params["words"]["embedding"] * 10
        ContrastiveScorer(network, params, 16.0).save(folder / name)
    distance, blank = LatentLPIPS((4,) * 5), jnp.zeros((1, 4, 4, 4))
    params = jax.jit(distance.init)(jax.random.key(2), blank, blank)["params"]
    save_latent_lpips(folder / "lpips", distance, params, 4, {})
    return folder


def all_terms(folder: Path) -> dict:
    """Every term, its files from that folder; each auxiliary network at a rate of its own."""
    return dict(
        latent_lpips=dict(weights=str(folder / "lpips")),
        preference=dict(
            scorers=dict(
                liked=dict(scorer="miniature.contrastive", weights=str(folder / "scorer"))
            ),
            held_out="miniature.contrastive",
            held_out_weights=str(folder / "held_out"),
        ),
        distribution_matching=dict(guidance_scale=2.0, aux_updates=2, aux_learning_rate=3e-4),
        adversarial=dict(aux_updates=1, aux_learning_rate=7e-4, layers=["mid_block"]),
    )


def tiny_recipe(folder: Path, stages: dict, **changes) -> dict:
    """A recipe of these stages with SDXL's ratio of alpha to rank: not 1."""
    base = dict(
        name="tiny",
        model=dict(path=str(folder / "teacher")),
        prompts=[str(folder / "prompts.txt")],
        adapter=dict(rank=4, alpha=0.5),
        stages=stages,
        stage_order=list(stages),
        log_every=1,
        checkpoint_every=1,
        export=["lora"],
    )
    return base | changes
