"""What a model's PATH names: where its configs and tokenizers lie, and each network's tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tlcm_jax.io import buckets
from tlcm_jax.io.hub import HubId, fetch
from tlcm_jax.io.tensors import Tensors, open_component, refuse_pickle, weights_stem

# Beside a single file: its own configs. `export --to single-file` writes them there.
CONFIG_FOLDER = "config"


class SingleFile:
    """An open checkpoint that holds all networks of a model, without their configs.

    Attributes:
      published: the repository whose configs and tokenizers such a file goes with.
    """

    published: HubId

    def component(self, name: str, shapes: Mapping) -> Tensors:
        """A component's tensors under the names that a diffusers folder gives them.

        Args:
          name: of the component.
          shapes: its tree of `jax.ShapeDtypeStruct`.
        """
        raise NotImplementedError

    def scheduler(self, config: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        """A scheduler's config, corrected by what the file says of its schedule.

        Args:
          config: the config that goes with the file.
          own: it was given with it, rather than its family's published one.
        """
        return dict(config)

    def check_all_used(self) -> None:
        """Raises a ValueError that names tensors which a component should have taken.

        Those that belong to no component are left out, with one warning.
        """
        raise NotImplementedError


class ComponentFiles:
    """A component that lies elsewhere than its model.

    Attributes:
      config: its JSON; None where the model's own holds.
    """

    config: Path | None = None

    def component(self, shapes: Mapping) -> Tensors:
        """Its tensors, by the names of a diffusers folder."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's files.

    Attributes:
      name: the path or id as it was given.
      folder: a local folder with all configs and tokenizers.
      file: the single-file checkpoint that holds the weights; None where they lie in the folder.
      variant: of the folder's weights.
      own_config: the folder was given, rather than that of a single file's family.
      parts: components that lie elsewhere.
    """

    name: str
    folder: Path
    file: SingleFile | None = None
    variant: str | None = None
    own_config: bool = True
    parts: Mapping[str, ComponentFiles] = dataclasses.field(default_factory=dict)

    @classmethod
    def find(
        cls,
        path: str | Path,
        open_file: Callable[[Path], SingleFile],
        *,
        variant: str | None = None,
        config: str | Path | None = None,
        weights: bool = True,
    ) -> "Source":
        """Finds a model, fetching what is needed of a hub id.

        Args:
          path: a folder or a single file, in a bucket too (`gs://`), or a hub id.
          open_file: opens a single file.
          variant: of the weights; not for single files.
          config: where a single file's configs are; not for others.
          weights: False fetches none from the hub.

        Raises:
          FileNotFoundError: there is no such thing.
          ValueError: a file that is no checkpoint, or an option that does not go with the path.
        """
        local = buckets.local(path)
        if local.is_file():
            if variant is not None:
                raise ValueError(f"{path} is a single file, which has no variant {variant!r}")
            refuse_pickle(local)
            file = open_file(local)
            folder, own = _config_folder(local, file.published, config)
            return cls(str(path), folder, file, own_config=own)
        if config is not None:
            raise ValueError(f"{path} is not a single file: it has configs of its own")
        if local.is_dir():
            return cls(str(path), local, variant=variant)
        if (hub_id := HubId.parse(path)) is None:
            raise FileNotFoundError(
                f"model {str(path)!r} is not a folder; give a diffusers pipeline folder (one that "
                "holds model_index.json), a single-file checkpoint or a hub id"
            )
        return cls(str(path), fetch(hub_id, weights=weights, variant=variant), variant=variant)

    def component(self, name: str, shapes: Mapping, config: Mapping[str, Any]) -> Tensors:
        """A network's tensors, by the names of a diffusers folder.

        Args:
          name: of the component and its folder.
          shapes: its tree of `jax.ShapeDtypeStruct`.
          config: its JSON.
        """
        if name in self.parts:
            return self.parts[name].component(shapes)
        if self.file is not None:
            return self.file.component(name, shapes)
        return open_component(self.folder / name, weights_stem(config), self.variant)

    def config_file(self, name: str) -> Path:
        """Where a network's JSON lies."""
        elsewhere = self.parts[name].config if name in self.parts else None
        return elsewhere or self.folder / name / "config.json"

    def scheduler(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A scheduler's config, corrected by what a single file says."""
        if self.file is None:
            return dict(config)
        return self.file.scheduler(config, own=self.own_config)

    def check_all_used(self) -> None:
        """See `SingleFile`; of a folder, `names.match_tensors` does it."""
        if self.file is not None:
            self.file.check_all_used()

    def label(self, name: str) -> str:
        """A network, for messages."""
        return self.name if self.file is not None else str(self.folder / name)


def _config_folder(file: Path, published: HubId, config: str | Path | None) -> tuple[Path, bool]:
    """Where the configs of a single file lie, and whether they were given with it."""
    if config is None and (file.parent / CONFIG_FOLDER / "model_index.json").is_file():
        config = file.parent / CONFIG_FOLDER
    if config is not None and Path(config).is_dir():
        return Path(config), True
    hub_id = published if config is None else HubId.parse(config)
    if hub_id is None:
        raise FileNotFoundError(f"config {str(config)!r} is neither a folder nor a hub id")
    try:
        return fetch(hub_id, weights=False), config is not None
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"a single file has no configs and tokenizers, and those of {hub_id.repository} are "
            f"not to be had ({error}); put a pipeline folder with them, without its weights, "
            f"beside {file} as {CONFIG_FOLDER!r}"
        ) from None
