"""Trains a Chinese adapter for SDXL from pairs of prompts alone: PEA-Diffusion's loss, no pictures.

    python -m tlcm_jax.train_text_adapter --model MODEL --lora student.safetensors \\
        --text_encoder chinese-clip-vit-huge-patch14 --pairs pairs.tsv --output zh

MODEL is the English teacher, --lora its few-step student, whose samples are noised (with a run's
workdir as --model it is the run's own). pairs.tsv has a line for each pair: the English prompt, a
tab, the Chinese one. What --config FILE says, such as `configs/sdxl_zh.py`, holds where flags are
not given. The output is a folder for `sample --adapter`. The defaults are those of PEA-Diffusion
(learning rate 1e-5, weight decay 0.1, a tenth of the pairs without prompts) but for steps and
batch, which are ours. The same command goes on from its last checkpoint.
"""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from safetensors.numpy import save_file

from tlcm_jax.config.workdir import trained_times
from tlcm_jax.data.prompts import PromptStream
from tlcm_jax.diffusion.timesteps import student_timesteps
from tlcm_jax.distillation.text_transfer import FEATURE_WEIGHT, text_transfer
from tlcm_jax.families.text_adapter import ADAPTER, ADAPTER_FILE
from tlcm_jax.generation.generate import merged
from tlcm_jax.io import names
from tlcm_jax.sample import load_with_adapter
from tlcm_jax.training import compilation
from tlcm_jax.training.fit import cosine, fit

_NEEDED = ("model", "text_encoder", "pairs", "output")
_COPIED = ("config.json", "model.safetensors", "vocab.txt")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags in `values`."""
    here = {"flag_values": values}
    config_flags.DEFINE_config_file("config", None, "Values of these flags.", **here)
    flags.DEFINE_string("model", None, "Folder, file, hub id or workdir.", **here)
    flags.DEFINE_multi_string("lora", None, "The few-step student's: PATH or hub id.", **here)
    flags.DEFINE_string("text_encoder", None, "Folder of Chinese-CLIP.", **here)
    flags.DEFINE_string("pairs", None, "Lines of English, tab, Chinese.", **here)
    flags.DEFINE_string("output", None, "Folder to write.", **here)
    flags.DEFINE_string("workdir", "runs/text-adapter", "Where checkpoints go.", **here)
    flags.DEFINE_integer("steps", 20000, "Optimiser steps.", lower_bound=1, **here)
    flags.DEFINE_integer("batch", 16, "Pairs of a step.", lower_bound=1, **here)
    flags.DEFINE_integer("hidden_width", 2048, "Of a new adapter.", lower_bound=1, **here)
    flags.DEFINE_integer("sample_steps", 4, "Of the student's samples.", **here)
    flags.DEFINE_float("learning_rate", 1e-5, "Peak of its cosine.", **here)
    flags.DEFINE_float("weight_decay", 0.1, "AdamW's.", lower_bound=0, **here)
    flags.DEFINE_float(
        "unconditional", 0.1, "Share of the pairs without prompts.",
        lower_bound=0, upper_bound=1, **here,
    )  # fmt: skip
    flags.DEFINE_float(
        "feature_weight", FEATURE_WEIGHT, "Of the blocks' states.", lower_bound=0, **here
    )


def main(arguments: Sequence[str]) -> None:
    """Trains; anything wrong ends the process with one line that says what."""
    try:
        if arguments[1:]:
            raise ValueError(f"unexpected arguments {list(arguments[1:])}")
        run(flags.FLAGS)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"train_text_adapter: {error}")


def run(values: flags.FlagValues) -> None:
    """Does what the flags say."""
    take_config(values)
    output, encoder = Path(values.output), Path(values.text_encoder)
    pairs = read_pairs(values.pairs)
    times = trained_times(values.model).get(values.sample_steps)
    times = tuple(times or student_timesteps(values.sample_steps))
    model, student, base = load_with_adapter(values.model, values.lora)
    if student is None:
        raise ValueError("give --lora, the few-step student's, or a run's workdir as --model")
    fresh = base.with_new_text_adapter(encoder, jax.random.key(0), values.hidden_width)
    frozen = {
        "teacher": base.params[base.backbone],
        "student": merged(model.params[model.backbone], student),
        "texts": fresh.params,
    }
    trained = fit(
        text_transfer(fresh, times, values.unconditional, values.feature_weight),
        fresh.params[ADAPTER],
        batches(base, fresh, pairs, values.batch, frozen),
        steps=values.steps,
        learning_rate=cosine(values.learning_rate, values.steps, min(100, values.steps // 2)),
        workdir=Path(values.workdir),
        weight_decay=values.weight_decay,
    )
    output.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        if (encoder / name).resolve() != (output / name).resolve():
            shutil.copyfile(encoder / name, output / name)
    tensors = {k: np.ascontiguousarray(v) for k, v in names.to_torch(trained).items()}
    save_file(tensors, output / ADAPTER_FILE)
    print(f"written to {output}")


def take_config(values: flags.FlagValues) -> None:
    """Sets the flags that were not given to what `--config` says of them.

    Raises:
      ValueError: it has a key that is no flag, or a flag that is needed stands nowhere.
    """
    for name, value in (values.config or {}).items():
        if name == "config" or name not in values:
            raise ValueError(f"--config: {name!r} is no flag of this command (--help)")
        if not values[name].present:
            setattr(values, name, value)
    for name in _NEEDED:
        if getattr(values, name) is None:
            raise ValueError(f"give --{name}, or a --config that has it")


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """Pairs of prompts, a line each: English, tab, Chinese.

    Raises:
      FileNotFoundError, ValueError: no file, or a line that is no pair.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{path}, line {number}: must be the English prompt, a tab, the other")
        found.append((parts[0], parts[1]))
    if not found:
        raise ValueError(f"{path} holds no pairs")
    return found


def batches(
    base: Any, fresh: Any, pairs: Sequence[tuple[str, str]], size: int, frozen: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Batches of `text_transfer`, without end."""
    english = base.tokenize([pair[0] for pair in pairs])
    (other,) = fresh.tokenize([pair[1] for pair in pairs])
    shared = {
        "empty": fresh.tokenize([""])[0],
        "null": base.null_conditioning(),
        "frozen": frozen,
    }
    stream, r = PromptStream([pair[0] for pair in pairs], size, seed=0), 0
    while True:
        rows = stream.indices(r)
        yield {"english": tuple(ids[rows] for ids in english), "other": other[rows], **shared}
        r += 1


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # Orbax tells each of its options
    define_flags(flags.FLAGS)
    compilation.use_cache()
    app.run(main)
