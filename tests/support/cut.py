"""A run that dies: what resuming is tested with."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tlcm_jax.training.checkpoints import Checkpoints


@contextmanager
def cut_after(total: int) -> Iterator[None]:
    """A run inside must die as soon as the checkpoint of its step `total` has been saved."""

    class Cut(Exception):
        pass

    def save_and_die(self, position, state, save=Checkpoints.save):
        save(self, position, state)
        if position.total == total:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Cut):
            yield
