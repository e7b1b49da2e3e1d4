"""Where a LoRA lies: a file, a folder of diffusers' or PEFT's, or the hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tlcm_jax.io import buckets
from tlcm_jax.io.hub import HubId, fetch_files
from tlcm_jax.io.json_files import read_object
from tlcm_jax.io.pipeline_index import INDEX_FILE
from tlcm_jax.io.tensors import refuse_pickle

# The names that diffusers' and PEFT's loaders look for in a folder.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

_SUFFIX = ".safetensors"


def find_lora(path: str | Path) -> tuple[Path, dict[str, Any] | None]:
    """The safetensors file, and the PEFT config beside it if it is an adapter folder's.

    Args:
      path: a file or a folder, in a bucket too (`gs://`), or on the hub
        `OWNER/NAME[@REVISION][:FILE]`.

    Raises:
      FileNotFoundError: there is no such thing, or no LoRA in it.
      ValueError: a pickle, or several files of which none is named.
    """
    local = buckets.local(path)
    if local.is_file():
        refuse_pickle(local)
        return local, None
    if local.is_dir():
        return _in_folder(local)
    text, _, wanted = str(path).partition(":")
    source = None if text.endswith(_SUFFIX) else HubId.parse(text)
    if source is None:
        raise FileNotFoundError(
            f"LoRA {str(path)!r} does not exist; give a safetensors file, a folder or a hub id "
            "(OWNER/NAME:FILE)"
        )
    folder = fetch_files(source, lambda names: _wanted(str(path), names, wanted))
    return _in_folder(folder) if not wanted else (folder / wanted, None)


def _in_folder(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    names = [path.name for path in files]
    if PEFT_CONFIG in names:
        if PEFT_FILE not in names:
            for other in files:
                refuse_pickle(other)
            raise FileNotFoundError(f"{folder} holds no {PEFT_FILE}; the folder is not whole")
        return folder / PEFT_FILE, read_object(folder / PEFT_CONFIG)
    if DIFFUSERS_FILE in names:
        return folder / DIFFUSERS_FILE, None
    if INDEX_FILE in names:
        raise FileNotFoundError(f"{folder} is a model, not a LoRA; give it with --model")
    single = [path for path in files if path.suffix == _SUFFIX]
    if len(single) == 1:
        return single[0], None
    if not single:
        for other in files:
            refuse_pickle(other)
    inside = sorted(str(found.parent) for found in folder.glob(f"**/{PEFT_CONFIG}"))
    choices = inside or [str(path) for path in single]
    raise FileNotFoundError(
        f"{folder} holds neither {PEFT_CONFIG} nor {DIFFUSERS_FILE}; give "
        + (f"one of {', '.join(choices[:10])}" if choices else "the safetensors file")
    )


def _wanted(spec: str, names: Sequence[str], wanted: str) -> list[str]:
    """Which of a repository's files a LoRA is read from."""
    found = [name for name in names if name.endswith(_SUFFIX)]
    if wanted:
        refuse_pickle(Path(wanted))
        if wanted not in names or not re.fullmatch(r"[\w][\w ./-]*", wanted) or ".." in wanted:
            raise FileNotFoundError(f"{spec}: no such file there; it has {_listed(found)}")
        return [wanted]
    if PEFT_CONFIG in names and PEFT_FILE in names:
        return [PEFT_CONFIG, PEFT_FILE]
    if DIFFUSERS_FILE in names:
        return [DIFFUSERS_FILE]
    top = [name for name in found if "/" not in name]
    if INDEX_FILE in names:
        raise FileNotFoundError(f"{spec} is a model, not a LoRA; give it with --model")
    if len(top) == 1:
        return top
    for name in names if not found else ():
        refuse_pickle(Path(name))
    if not found:
        raise FileNotFoundError(f"{spec} holds no safetensors file")
    raise FileNotFoundError(f"{spec} holds several; name one, {spec}:FILE, of {_listed(found)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more if names else "none"
