"""Trains a ControlNet or a T2I-Adapter for a model, on your pictures with captions and maps.

    python -m tlcm_jax.train_control --model MODEL --kind controlnet --images DIR --output edges
    python -m tlcm_jax.train_control --model MODEL --kind t2i-adapter --images DIR --canny ...

DIR holds pictures and `metadata.jsonl`, a line for each: file_name, text, and the map's
conditioning_image_file_name, unless --canny takes the pictures' edges. MODULE:FUNCTION instead of
DIR is a Python function that yields batches (`tlcm_jax.data.control_pictures`). The model stays as
it is; a ControlNet begins as a copy of its encoder. The output is a folder that
`sample --control`, and diffusers' `ControlNetModel.from_pretrained` or
`T2IAdapter.from_pretrained`, read. Students of the model take it as it is. The same command goes on
from its last checkpoint.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from tlcm_jax.config.size_flags import define_size_flags, given_size
from tlcm_jax.data.control_pictures import Examples, Line, folder_examples, function_examples
from tlcm_jax.distillation.control_loss import control_loss
from tlcm_jax.families.base import LatentModel
from tlcm_jax.families.load import load_model
from tlcm_jax.families.new_controls import KINDS
from tlcm_jax.generation.canvas import fit as fit_picture
from tlcm_jax.generation.canvas import read_picture
from tlcm_jax.generation.control import fit_control
from tlcm_jax.io.files import DTYPES
from tlcm_jax.io.image_size import Resolution
from tlcm_jax.io.pipeline_folder import write_component
from tlcm_jax.training import compilation
from tlcm_jax.training.fit import fit, trapezoid


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags in `values`."""
    here = {"flag_values": values}
    must = {"required": True, **here}
    flags.DEFINE_string("model", None, "Folder, file or hub id.", **must)
    flags.DEFINE_enum("kind", None, KINDS, "What to train.", **must)
    flags.DEFINE_string("images", None, "Folder, or MODULE:FUNCTION.", **must)
    flags.DEFINE_string("output", None, "Folder to write.", **must)
    flags.DEFINE_string("workdir", "runs/control", "Where checkpoints go.", **here)
    flags.DEFINE_bool("canny", False, "The maps are the pictures' edges (OpenCV).", **here)
    flags.DEFINE_bool("grey", False, "The maps have one channel, and not three.", **here)
    flags.DEFINE_list(
        "embedding_widths", [], "Of a ControlNet's stages for the map (16,32,96,256).", **here
    )
    flags.DEFINE_integer("steps", 15000, "Optimiser steps.", lower_bound=1, **here)
    flags.DEFINE_integer("batch", 16, "Pictures of a step.", lower_bound=1, **here)
    flags.DEFINE_float("learning_rate", 1e-5, "Its plateau; the last fifth falls to 0.", **here)
    flags.DEFINE_float(
        "unconditional", 0.1, "Share of the pictures without their captions.",
        lower_bound=0, upper_bound=1, **here,
    )  # fmt: skip
    flags.DEFINE_integer("save_every", 500, "Steps between checkpoints.", lower_bound=1, **here)
    flags.DEFINE_integer("seed", 0, "Of noise, order and first weights.", **here)
    flags.DEFINE_enum("dtype", "fp32", sorted(DTYPES), "Of the weights written.", **here)
    define_size_flags(values, "the model's own")


def main(arguments: Sequence[str]) -> None:
    """Trains; anything wrong ends the process with one line that says what."""
    try:
        if arguments[1:]:
            raise ValueError(f"unexpected arguments {list(arguments[1:])}")
        run(flags.FLAGS)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        sys.exit(f"train_control: {error}")


def run(values: flags.FlagValues) -> None:
    """Does what the flags say."""
    try:
        widths = tuple(int(width) for width in values.embedding_widths)
    except ValueError:
        raise ValueError("--embedding_widths: give whole numbers, such as 16,32,96,256") from None
    resolution, output = given_size(values), Path(values.output)
    model = load_model(values.model)
    control, config = model.new_control(
        values.kind, jax.random.key(values.seed), channels=1 if values.grey else 3, widths=widths
    )
    size = model.image_size(resolution)
    found = function_examples(values.images, values.batch, values.seed)
    if found is None:
        found = _of_folder(values, size, control.channels)
    elif values.canny:
        raise ValueError(f"--canny takes edges of a folder's pictures; {values.images} yields maps")

    def write(step: int, params: Any) -> None:
        del step
        write_component(output, config, params, values.dtype)

    rate = trapezoid(
        values.learning_rate, values.steps, warmup=min(100, values.steps // 4), decay=0.2
    )
    trained = fit(
        control_loss(model.without_weights(), control.network, values.unconditional),
        control.params,
        batches(model, found, values.images, size, control.channels, resolution),
        steps=values.steps,
        learning_rate=rate,
        workdir=Path(values.workdir),
        seed=values.seed,
        save_every=values.save_every,
        report=write,
    )
    write(values.steps, trained)
    print(f"written to {output}")


def _of_folder(
    values: flags.FlagValues, size: tuple[int, int], channels: int
) -> Iterator[Examples]:
    """A folder's pictures and maps, fitted as `sample` fits them."""

    def image_of(path: Path) -> np.ndarray:
        return np.asarray(fit_picture(read_picture(path), size)[0])

    def map_of(line: Line) -> np.ndarray:
        source = line.image if values.canny else line.map
        if source is None:
            raise ValueError(
                f"{line.image} has no map (conditioning_image_file_name); give one, or --canny"
            )
        return fit_control(read_picture(source), size, channels, edges=values.canny)[0][0]

    return folder_examples(Path(values.images), values.batch, values.seed, image_of, map_of)


def batches(
    model: LatentModel,
    examples: Iterator[Examples],
    source: str,
    size: tuple[int, int],
    channels: int,
    resolution: Resolution = None,
) -> Iterator[dict[str, Any]]:
    """Batches of `control_loss`.

    Args:
      model: with its weights.
      examples: what to encode.
      source: of the examples, for messages.
      size: height and width that they must have.
      channels: of the maps.
      resolution: what the model is told of it.
    """
    encode = jax.jit(lambda images, params: model.encode_images(images / 255, params))
    shared = {
        "null": model.null_conditioning(resolution),
        "frozen": model.params[model.backbone],
    }
    for batch in examples:
        batch.check(source, size, channels)
        conditioning = model.encode(list(batch.texts), resolution)
        latents = batch.latents
        if batch.images is not None:
            latents = encode(batch.images.astype(np.float32), model.params)
        yield {
            "latents": jnp.asarray(latents, jnp.float32),
            "conditioning": model.with_controls(
                conditioning, [jnp.asarray(batch.maps, jnp.float32) / 255], [1.0]
            ),
            **shared,
        }


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # Orbax tells each of its options
    define_flags(flags.FLAGS)
    compilation.use_cache()
    app.run(main)
