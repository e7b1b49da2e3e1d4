"""What an experiment is, and the recipe that it comes to."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlcm_jax.config.schema import Settings, read

# The embedded default, whose teacher, prompts and judge are those of all experiments.
DEFAULT = "shapes"

# What a student is drawn in where a table does not ask for less.
ALL_STEPS = (2, 3, 4, 8)

# What makes the weights that terms need, by the term.
_MAKERS = {"latent_lpips": "shapes.train_latent_lpips", "preference": "shapes.train_scorer"}


class NotHere(Exception):
    """A recipe or a setting that this version of the library does not have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A recipe, changed.

    Attributes:
      name: of the row, the run's folder and the column of a contact sheet; at most 12 letters.
      says: what the row is, for the page.
      recipe: `NAME` or `NAME:VARIANT` of `configs/NAME.py`.
      stages: those kept, in this order; none given keeps all.
      changes: values by dotted config key.
      shares: how the kept stages share the evaluations, in any unit; none given keeps the shares
        that they have in the recipe without `changes`.
    """

    name: str
    says: str
    recipe: str
    stages: tuple[str, ...] = ()
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def base(self) -> dict[str, Any]:
        """The recipe with the kept stages alone, as plain values.

        Raises:
          NotHere: there is no such recipe.
        """
        config = recipe(self.recipe)
        order = self.stages or tuple(config.get("stage_order") or config["stages"])
        config["stages"] = {name: config["stages"][name] for name in order}
        config["stage_order"] = order
        return config

    def config(self) -> dict[str, Any]:
        """The recipe with the changes, its stages' steps still the recipe's own.

        Raises:
          NotHere: there is no such recipe, or no such setting.
          ValueError: a setting's value is wrong.
        """
        config = self.base()
        for path, value in self.changes.items():
            *parents, last = path.split(".")
            node = config
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = value
        # What a comparison has no use for.
        config |= {"export": (), "keep_checkpoints": 1}
        try:
            read(config)
        except ValueError as error:
            if "unknown config key" in str(error):
                raise NotHere(str(error)) from None
            raise
        return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Experiments that are compared with each other.

    Attributes:
      name: of its contact sheets, and for `--only`.
      title: heading.
      says: a sentence or two under it.
      experiments: the rows, of different names.
      steps: the student's step counts.
      shown: those of them that get a contact sheet.
      followed: keys of the measures that are told at all of them; none given takes all.
      against: the experiment that the others are held against, seed by seed; "" holds none.
    """

    name: str
    title: str
    says: str
    experiments: tuple[Experiment, ...]
    steps: tuple[int, ...] = (4,)
    shown: tuple[int, ...] = (4,)
    followed: tuple[str, ...] = ()
    against: str = ""


def recipe(name: str) -> dict[str, Any]:
    """A recipe of `configs/` as plain values; `NAME` or `NAME:VARIANT`.

    Raises:
      NotHere: there is no such file, or it has no such variant.
    """
    module, _, variant = name.partition(":")
    try:
        found = importlib.import_module(f"configs.{module}")
    except ModuleNotFoundError as error:
        if error.name != f"configs.{module}":
            raise
        raise NotHere(f"configs/{module}.py is not there") from None
    try:
        return found.get_config(variant).to_dict()
    except ValueError as error:
        if "has no variant" in str(error):
            raise NotHere(str(error)) from None
        raise


def missing_files(settings: Settings) -> str:
    """Which weights or latents a recipe needs that are not there, and what makes them; or ""."""
    if settings.latents and not Path(settings.latents).is_file():
        return (
            "the real latents are missing (`python -m miniature.shapes.encode_latents` makes them)"
        )
    for stage in settings.stages.values():
        for name, chosen in stage.terms.items():
            parts = (chosen, *getattr(chosen, "scorers", {}).values())
            folders = [folder for part in parts if (folder := getattr(part, "weights", ""))]
            if chosen.weight > 0 and not all(Path(folder).is_dir() for folder in folders):
                maker = _MAKERS.get(name)
                hint = f" (`python -m miniature.{maker}` makes them)" if maker else ""
                return f"the weights of {name} are missing{hint}"
    return ""
