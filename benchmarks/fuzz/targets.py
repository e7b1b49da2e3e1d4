"""Every reader of what a user gives, each with a small valid file of its kind."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A reader and a valid file that it reads.

    Attributes:
      name: of the kind of file.
      file: the file that is damaged.
      kind: how, a key of `mutations.CHANGES`.
      read: reads; given a generator of random numbers.
      weight: how often it is chosen, against the others.
    """

    name: str
    file: Path
    kind: str
    read: Callable[[random.Random], Any]
    weight: float = 1.0
