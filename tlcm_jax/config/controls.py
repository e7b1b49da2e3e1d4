"""A recipe's `model.controls`: frozen control networks to distil through, and the prompts' maps.

Student and teacher see the same maps and the same networks, so what is distilled is the steered
teacher. A map's folder holds `metadata.jsonl` as `data.control_pictures` reads it: of each prompt a
line with its `text` and its map, `conditioning_image_file_name`, or `file_name` without one.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from tlcm_jax.config.schema import ControlSettings, ModelSettings
from tlcm_jax.data.control_pictures import METADATA, read_lines
from tlcm_jax.families.base import LatentModel
from tlcm_jax.families.controls import ControlNetwork
from tlcm_jax.generation.canvas import read_picture
from tlcm_jax.generation.control import fit_control


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptMaps:
    """The maps of a list of prompts, read when they are asked for.

    Attributes:
      files: a map for each prompt.
      size: height and width that they are fitted to, as `sample` fits them.
      channels: of the network's maps, 3 or 1.
    """

    files: Sequence[Path]
    size: tuple[int, int]
    channels: int

    def __getitem__(self, rows: np.ndarray) -> UInt8[np.ndarray, "b h w c"]:
        """Those of some prompts, by their numbers."""
        found = [
            fit_control(read_picture(self.files[row]), self.size, self.channels)[0] for row in rows
        ]
        return np.concatenate(found)


def load_control_networks(model: LatentModel, settings: ModelSettings) -> list[ControlNetwork]:
    """The networks that a recipe names, in its order.

    Raises:
      FileNotFoundError, ValueError: there is no such network, or none of the model's family.
    """
    return [model.load_control(control.path) for control in settings.controls.values()]


def read_maps(
    model: LatentModel,
    settings: ModelSettings,
    networks: Sequence[ControlNetwork],
    prompts: Sequence[str],
) -> list[PromptMaps]:
    """The maps of a recipe's prompts, for each of its control networks.

    Raises:
      FileNotFoundError: there are no maps.
      ValueError: a prompt has none; it is named.
    """
    found = []
    for (name, control), network in zip(settings.controls.items(), networks, strict=True):
        files = {line.text.strip(): line.map or line.image for line in _lines(name, control)}
        missing = next((prompt for prompt in prompts if prompt not in files), None)
        if missing is not None:
            raise ValueError(
                f"model.controls.{name}.images = {control.images}: no map for the prompt "
                f"{missing!r}; every prompt needs one"
            )
        found.append(
            PromptMaps(
                files=[files[prompt] for prompt in prompts],
                size=model.image_size(settings.size),
                channels=network.channels,
            )
        )
    return found


def control_contents(settings: ModelSettings) -> list[str]:
    """A recipe's control networks and maps by content: of the maps their list and their sizes."""
    return [_content(name, control) for name, control in settings.controls.items()]


def _content(name: str, control: ControlSettings) -> str:
    path, digest = Path(control.path), hashlib.sha256(f"{control.scale:g}".encode())
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        digest.update(control.path.encode())  # a hub id
    for file in (*files, Path(control.images) / METADATA):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    for line in _lines(name, control):
        digest.update(str((line.map or line.image).stat().st_size).encode())
    return digest.hexdigest()


def _lines(name: str, control: ControlSettings) -> list:
    try:
        return read_lines(Path(control.images))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"model.controls.{name}.images: {error}") from None
