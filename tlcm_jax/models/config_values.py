"""Values of configs that several networks read alike."""

from collections.abc import Mapping
from typing import Any


def switch(raw: Mapping[str, Any], name: str, default: bool) -> Any:
    """A config's truth value as it stands, so that its type is checked; a null is false.

    Args:
      raw: the config.
      name: of the key.
      default: where the key is absent.
    """
    value = raw.get(name, default)
    return False if value is None else value
