"""A pipeline folder's `model_index.json`: what the pipeline is, and the folders it is made of."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlcm_jax.io.checkpoint_kinds import describe_folder
from tlcm_jax.io.json_files import read_object

INDEX_FILE = "model_index.json"
# Components that generation works without.
OPTIONAL = frozenset({"safety_checker", "feature_extractor", "image_encoder"})


@dataclasses.dataclass(frozen=True)
class PipelineIndex:
    """The index of a folder.

    Attributes:
      kind: the pipeline's class name.
      content: the whole JSON object.
      components: library and class of each component that there is, by the name of its folder.
    """

    kind: str
    content: Mapping[str, Any]
    components: Mapping[str, tuple[str, str]]


def read_index(folder: Path) -> PipelineIndex:
    """Reads and checks a folder's index.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not JSON, or a component's name is not that of a folder beside it.
    """
    path = folder / INDEX_FILE
    if not path.is_file() and folder.is_dir():
        config = folder / "config.json"
        kind = str(read_object(config).get("_class_name")) if config.is_file() else None
        if described := describe_folder(folder, kind):
            raise FileNotFoundError(f"{folder} is {described}")
    content = read_object(path)
    components = {
        name: (str(entry[0]), str(entry[1]))
        for name, entry in content.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    }
    for name in components:
        # A name is joined to paths that are read and written.
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"{path}: component {name!r} is not a plain folder name; remove it")
    # Flax's pipelines are of the same networks.
    kind = str(content.get("_class_name")).removeprefix("Flax")
    return PipelineIndex(kind, content, components)
