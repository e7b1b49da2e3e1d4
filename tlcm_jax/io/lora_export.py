"""Writing a student's LoRA, in diffusers' names or kohya's (`io.lora_files` reads them all).

What is written has the scale folded into B, so alpha = r and every reader's own scale is 1.

kohya's trainer names a layer by its place in the network that it trains: for SD 1.x and 2.x that is
diffusers' (`lora_unet_up_blocks_0_upsamplers_0_conv`), for SDXL the single-file checkpoint's
(`lora_unet_output_blocks_2_2_conv`). Those are the names that every other program knows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from tlcm_jax.io import names
from tlcm_jax.io.files import atomic_write, cast, save_tensors
from tlcm_jax.io.lora_names import LoraNames, kohya_name
from tlcm_jax.io.names import Path_

DIALECTS = ("diffusers", "kohya")


def write_lora(
    path: str | Path,
    adapter: Mapping[str, Any],
    naming: LoraNames,
    *,
    dialect: str = "diffusers",
    renamed: Mapping[str, str] | None = None,
    dtype: str = "fp32",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes an adapter as one safetensors file, over one that may be there.

    Args:
      path: the file.
      adapter: LoRA tree of the backbone, already scaled.
      naming: the family's.
      dialect: `diffusers` or `kohya`; both load with `pipe.load_lora_weights`.
      renamed: what kohya's names are made of, for each layer of the backbone; by default the
        layers' own names.
      dtype: one of `files.DTYPES`.
      metadata: text shown by tools that list a file's header.

    Returns:
      The path.

    Raises:
      ValueError: a dialect that the family has no names in, a value that does not fit in the
        dtype, or (kohya) two layers whose names become one.
      OSError: the file cannot be written; nothing half written is left.
    """
    dialects = DIALECTS if naming.backbone in naming.kohya else DIALECTS[:1]
    if dialect not in dialects:
        raise ValueError(f"LoRA dialect {dialect!r} is not one of {', '.join(dialects)}")
    tensors: dict[str, np.ndarray] = {}
    for layer, (down, up) in sorted(_layers(adapter).items()):
        name = ".".join(layer)
        down, up = (names.to_torch_layout(("kernel",), np.asarray(x)) for x in (down, up))
        flat = name
        if dialect == "diffusers":
            full = f"{naming.backbone}.{name}"
            stored = {f"{full}.lora_A.weight": down, f"{full}.lora_B.weight": up}
        else:
            flat = kohya_name(((renamed or {}).get(name, name),), naming.kohya[naming.backbone][0])
            alpha = np.asarray(down.shape[0], np.float32)
            stored = {
                f"{flat}.lora_down.weight": down,
                f"{flat}.lora_up.weight": up,
                f"{flat}.alpha": alpha,
            }
        if any(key in tensors for key in stored):
            raise ValueError(f"two layers are called {flat} in kohya's names")
        tensors.update({key: cast(key, value, dtype) for key, value in stored.items()})
    path = Path(path)
    with atomic_write(path) as part:
        save_tensors(part, tensors, metadata)
    return path


def _layers(adapter: Mapping[str, Any]) -> dict[Path_, tuple[Any, Any]]:
    flat = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, adapter))
    return {
        path[:-1]: (leaf, flat[(*path[:-1], "lora_B")])
        for path, leaf in flat.items()
        if path[-1] == "lora_A"
    }
