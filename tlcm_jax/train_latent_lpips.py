"""Trains a latent LPIPS on BAPPS, people's rankings of changed pictures, in a model's own latents.

    python -m tlcm_jax.train_latent_lpips --bapps 2afc --model PATH --output scorers/latent_lpips

The paper (TLCM, arXiv 2406.05768) trains its own so (Kang et al., arXiv 2405.05967, how). `--bapps`
is the release's folder `2afc`, with `train` and `val`; PATH, as for `sample`, is the model whose
autoencoder makes the latents. Stopped, the same command goes on. Printed at the end: how often the
ranking of held-out triplets is people's, beside that of the latents' mean square. The public
networks of the package `elatentlpips` need no training (docs/own-model.md).
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from tlcm_jax.data.bapps import bapps_triplets
from tlcm_jax.distillation.ranking import Triplets, held_out, ranking_loss
from tlcm_jax.families.load import load_model
from tlcm_jax.io.latent_lpips_files import save_latent_lpips
from tlcm_jax.models.latent_lpips import LatentLPIPS
from tlcm_jax.training import compilation
from tlcm_jax.training.fit import cosine, fit

# Batches of held-out triplets that are scored at the end.
_TESTED = 30


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags in `values`."""
    here = {"flag_values": values}
    must = {"required": True, **here}
    flags.DEFINE_string("bapps", None, "BAPPS' folder 2afc, with train and val.", **must)
    flags.DEFINE_string("model", None, "Folder, file or hub id, for its autoencoder.", **must)
    flags.DEFINE_string("output", None, "Folder to write.", **must)
    flags.DEFINE_string("workdir", "runs/latent-lpips", "Where checkpoints go.", **here)
    flags.DEFINE_integer("steps", 20000, "Optimiser steps.", lower_bound=1, **here)
    flags.DEFINE_integer("batch", 32, "Triplets of a step.", lower_bound=1, **here)
    flags.DEFINE_float("learning_rate", 1e-4, "Peak of its cosine.", **here)


def train(
    network: LatentLPIPS,
    triplets: Iterator[Triplets],
    test: Iterator[Triplets],
    *,
    steps: int,
    learning_rate: float,
    workdir: Path,
    output: Path,
) -> dict[str, float]:
    """Trains a network and writes it.

    Args:
      network: to train, from random weights.
      triplets: batches to learn from.
      test: batches to score at the end.
      steps: optimiser steps.
      learning_rate: peak of its cosine.
      workdir: where checkpoints go.
      output: the folder to write.

    Returns:
      Agreement with the judges on `test`: the network's, and that of the latents' mean square.
    """
    channels = next(test)["reference"].shape[-1]
    blank = jnp.zeros((1, 8, 8, channels))
    params = network.init(jax.random.key(0), blank, blank)["params"]
    trained = fit(
        ranking_loss(network),
        {"network": params, "slope": jnp.float32(math.log(10))},
        triplets,
        steps=steps,
        learning_rate=cosine(learning_rate, steps, warmup=min(100, steps // 2)),
        workdir=workdir,
        ema_decay=0.99,
    )
    scores = held_out(network, trained["network"], test, count=_TESTED)
    save_latent_lpips(output, network, trained["network"], channels, scores)
    return scores


def main(arguments: Sequence[str]) -> None:
    """Trains; anything wrong ends the process with one line that says what."""
    try:
        if arguments[1:]:
            raise ValueError(f"unexpected arguments {list(arguments[1:])}")
        run(flags.FLAGS)
    except (ValueError, OSError) as error:
        sys.exit(f"train_latent_lpips: {error}")


def run(values: flags.FlagValues) -> None:
    """Does what the flags say."""
    if not (Path(values.bapps) / "train").is_dir() or not (Path(values.bapps) / "val").is_dir():
        raise FileNotFoundError(f"{values.bapps} has no train and val: give BAPPS' folder 2afc")
    encode = load_model(values.model).encode_images
    triplets, test = (
        bapps_triplets(Path(values.bapps) / part, encode, values.batch, seed)
        for seed, part in enumerate(("train", "val"))
    )
    scores = train(
        LatentLPIPS(),
        triplets,
        test,
        steps=values.steps,
        learning_rate=values.learning_rate,
        workdir=Path(values.workdir),
        output=Path(values.output),
    )
    print(f"agreement with people on held-out triplets: {scores}; written to {values.output}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    compilation.use_cache()
    app.run(main)
