"""Converts a pickled checkpoint into safetensors, once, so that nothing else has to read pickles.

    python -m tlcm_jax.io.convert_weights HPS_v2.1_compressed.pt

writes `HPS_v2.1_compressed.safetensors` beside it; a second argument names another place. Needs
torch (the extra `verify`), which reads the pickle with `weights_only=True`: tensors and plain
containers, no code. Of a training checkpoint the weights are taken (`state_dict` or `model`).
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Under which a checkpoint keeps its weights, beside its optimiser's state.
_INSIDE = ("state_dict", "model", "model_state_dict", "module")
# What torch's wrappers of several devices put before every name.
_WRAPPER = "module."


def convert_weights(source: str | Path, target: str | Path | None = None) -> Path:
    """Writes the tensors of a pickled checkpoint as safetensors, in their own dtypes.

    Args:
      source: the checkpoint.
      target: the file to write; by default beside the source.

    Returns:
      The file that was written.

    Raises:
      ModuleNotFoundError: torch is not installed.
      FileNotFoundError: there is no such file.
      ValueError: the file holds more than tensors and plain values, or no named tensors.
    """
    import torch
    from safetensors.torch import save_file

    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not a file")
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its parts raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source} is not a checkpoint of tensors alone ({reason})") from None
    tensors = {
        name.removeprefix(_WRAPPER): value.contiguous().clone()
        for name, value in _weights(found).items()
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise ValueError(f"{source} holds no named tensors")
    target = source.with_suffix(".safetensors") if target is None else Path(target)
    save_file(tensors, target, metadata={"format": "pt"})
    return target


def _weights(found: Any) -> Mapping[str, Any]:
    """The mapping of names to tensors in what a checkpoint holds."""
    for key in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            return found[key]
    return found if isinstance(found, Mapping) else {}


def main(arguments: Sequence[str]) -> None:
    """The command; anything wrong ends it with one line that says what."""
    if len(arguments) not in (1, 2):
        sys.exit(
            "convert_weights: give a checkpoint, and the safetensors file to write if not beside"
        )
    try:
        print(convert_weights(*arguments))
    except ModuleNotFoundError as error:
        sys.exit(f"convert_weights: {error}; pip install 'tlcm_jax[verify]'")
    except (ValueError, OSError) as error:
        sys.exit(f"convert_weights: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
