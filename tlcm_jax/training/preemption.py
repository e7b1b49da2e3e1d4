"""Notices that the machine is to be taken away (SIGTERM), so that the run can save first."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A context in which SIGTERM asks for a stop instead of ending the process.

    With one process the signal sets a flag. With several, JAX's coordination service has the
    signal, and chooses the step at which all of them stop.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._listening = False

    def __enter__(self) -> "Preemption":
        # Python takes signals in its main thread only; elsewhere SIGTERM keeps its meaning.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
            self._listening = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._listening:
            signal.signal(signal.SIGTERM, self._before)
            self._listening = False

    def requested(self, total: int) -> bool:
        """Whether to save and stop after this step; once it is so, it stays so.

        Args:
          total: steps done; every process must ask with every step, in order.
        """
        # The service says so at one step only, which may be one at which a run cannot stop.
        if jax.process_count() > 1 and not self._asked:
            self._asked = multihost_utils.reached_preemption_sync_point(total)
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True
