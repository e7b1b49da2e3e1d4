"""Draws in a page of this machine's own: a prompt, 1 to 8 steps, the teacher beside it.

    python -m tlcm_jax.serve --model PATH [--lora FILE] [--port 7860]

PATH and --lora are those of `tlcm_jax.sample`. The page is at http://127.0.0.1:7860/, for this
machine alone.
"""

import sys
from collections.abc import Sequence

from absl import app, flags, logging

from tlcm_jax.config.model_flags import define_model_flags
from tlcm_jax.config.workdir import (
    drawn_with,
    student_scales,
    trained_resolution,
    trained_times,
)
from tlcm_jax.diffusion.timesteps import STUDENT_TIMESTEPS
from tlcm_jax.sample import load_with_adapter
from tlcm_jax.serving.server import Server
from tlcm_jax.serving.studio import Studio
from tlcm_jax.training import compilation


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags in `values`."""
    where = {"flag_values": values}
    define_model_flags(values)
    flags.DEFINE_integer(
        "port", 7860, "Of the page; 0 takes a free one.", lower_bound=0, upper_bound=65535, **where
    )


def main(arguments: Sequence[str]) -> None:
    """Serves until it is interrupted; anything wrong ends with one line that says what."""
    try:
        if arguments[1:]:
            raise ValueError(f"unexpected arguments {list(arguments[1:])}")
        with make_server(flags.FLAGS) as server:
            print(f"{server.url} (stop with Ctrl-C)", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"serve: {error}")


def make_server(values: flags.FlagValues) -> Server:
    """The server that the flags describe, listening."""
    model, adapter, base = load_with_adapter(values.model, values.lora, vae=values.vae)
    if values.adapter is not None:
        model = model.with_text_adapter(values.adapter)
    trained = None if values.lora else trained_times(values.model)
    studio = Studio(
        model,
        adapter,
        tables=trained or STUDENT_TIMESTEPS,
        gamma=drawn_with(values.model, "gamma", 1.0),
        student_scale=student_scales(values.model, bool(values.lora))[0],
        teacher=None if adapter is None and base is model else base,
        teacher_scale=drawn_with(values.model, "guidance_scale", 8.0),
        resolution=trained_resolution(values.model),
    )
    return Server(studio, values.port)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # Orbax tells each of its options
    define_flags(flags.FLAGS)
    compilation.use_cache()
    app.run(main)
