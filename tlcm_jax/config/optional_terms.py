"""Terms whose weights a user does not have: which of a recipe's are left out, and how to have them.

A term that is `optional` asks for weights that are not the recipe's to give, such as a published
scorer's. Where they are not on disk the run goes without, and what the workdir remembers, the card
and the report say is the recipe without them.
"""

import copy
import os
from collections.abc import Mapping
from typing import Any

from tlcm_jax.io.buckets import is_bucket
from tlcm_jax.io.latent_lpips_files import is_latent_lpips


def without_missing(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe without the optional terms, and parts of terms, that have no weights here.

    Args:
      config: the recipe as plain nested values; not changed. What is wrong in it stays as it is,
        for `schema.read` to name.

    Returns:
      The recipe, and a line for each thing that is left out.
    """
    found = dict(config)
    if isinstance(config.get("stages"), Mapping):
        # Each by itself: stages may share the mapping of a term.
        found["stages"] = {name: copy.deepcopy(each) for name, each in config["stages"].items()}
    stages: dict[tuple[str, ...], list[str]] = {}
    named = dict(_mappings(found.get("stages")))
    order = [name for name in found.get("stage_order") or () if name in named]
    for name, stage in ((name, named[name]) for name in dict.fromkeys([*order, *named])):
        terms = stage.get("terms") or {}
        for term, chosen in _mappings(terms):
            missing = _missing(term, chosen)
            for each in missing:
                stages.setdefault((term, *each), []).append(name)
            if missing and (term == "latent_lpips" or not chosen["scorers"]):
                del terms[term]
    return found, [_line(key, names) for key, names in stages.items()]


def _missing(term: str, chosen: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Setting, weights and name of what a term lacks; parts of it are taken out of it."""
    if term == "latent_lpips" and chosen.get("optional", True) and chosen.get("weight", 1):
        weights = str(chosen.get("weights", ""))
        return [] if is_latent_lpips(weights) else [("weights", weights, "")]
    if term != "preference" or not chosen.get("optional", False):
        return []
    missing = []
    for key, scorer in _mappings(chosen.get("scorers")):
        weights = str(scorer.get("weights", ""))
        if not _there(weights):
            missing.append((f"scorers.{key}.weights", weights, key))
            del chosen["scorers"][key]
    held_out, weights = chosen.get("held_out", ""), str(chosen.get("held_out_weights", ""))
    if held_out and not _there(weights):
        missing.append(("held_out_weights", weights, f"its held-out reward, {held_out}"))
        chosen["held_out"] = chosen["held_out_weights"] = ""
    return missing


def _there(weights: str) -> bool:
    """Whether weights are on disk, or named where only their reader can say."""
    return not weights or is_bucket(weights) or os.path.exists(weights)


def _line(key: tuple[str, ...], stages: list[str]) -> str:
    term, setting, weights, part = key
    what = f"{term} ({part})" if part else term
    return (
        f"{what} is left out of {', '.join(stages)}: {weights!r} is not on disk; name its weights "
        f"by --config.stages.{stages[0]}.terms.{term}.{setting} (docs/own-model.md says which)"
    )


def _mappings(values: Any) -> list[tuple[str, dict[str, Any]]]:
    """The entries that are mappings, of what may be one."""
    if not isinstance(values, dict):
        return []
    return [(name, value) for name, value in values.items() if isinstance(value, dict)]
