"""Notices that the machine is to be taken away (SIGTERM), so that the run can save first."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: not done, and the same command goes on.
EXIT_CODE = 75


def _exit(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


class Preemption:
    """A context in which SIGTERM asks for a stop instead of ending the process.

    With one process the signal sets a flag, which the loop looks at between two steps. `at_once`
    ends the process by itself where that loses nothing: before the first step is done (it may be
    compiled for minutes), after the last, and at a second signal. A thread does it, since the main
    one may be inside a compiler that takes no signals.

    With several processes JAX's coordination service has the signal, and chooses the step at which
    all of them stop.

    Attributes:
      unsaved: whether steps have been done that no checkpoint holds.
      settle: called before an end at once, so that what is being saved is saved.
    """

    def __init__(self, at_once: bool = False, end: Callable[[str], None] = _exit):
        """Listens to nothing yet.

        Args:
          at_once: whether the process may be ended.
          end: ends it, with a message.
        """
        self.unsaved = False
        self.settle: Callable[[], None] = lambda: None
        self._at_once, self._end = at_once, end
        self._asked = False
        self._before: Any = None
        self._wakeup: socket.socket | None = None
        self._listening = False

    def __enter__(self) -> "Preemption":
        # Python takes signals in its main thread only; elsewhere SIGTERM keeps its meaning.
        main = threading.current_thread() is threading.main_thread()
        if main and not jax.distributed.is_initialized():
            self._before = signal.signal(signal.SIGTERM, self._ask)
            self._listening = True
            if self._at_once:
                ours, self._wakeup = socket.socketpair()
                self._wakeup.setblocking(False)
                signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
                threading.Thread(target=self._watch, args=(ours,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listening:
            if self._wakeup is not None:
                signal.set_wakeup_fd(-1)
                self._wakeup.close()
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

    def _watch(self, signals: socket.socket) -> None:
        """Reads the numbers of the signals that came, until the context ends."""
        before = 0
        with signals:
            while numbers := signals.recv(64):
                asked = numbers.count(signal.SIGTERM)
                if not asked:
                    continue
                before += asked
                if before > 1:
                    self._end("asked to stop twice: ended at once; the same command resumes")
                elif not self.unsaved:
                    with contextlib.suppress(Exception):
                        self.settle()
                    self._end("asked to stop: nothing was unsaved; the same command resumes")
