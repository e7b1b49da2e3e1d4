"""A profiler's trace of some steps of a run, for XProf or TensorBoard."""

import re
from pathlib import Path

import jax
from absl import logging


class Profiler:
    """A context in which `before(step)` starts and stops the trace."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path | None = None):
        """Begins no trace yet.

        Args:
          steps: the first and the last step to trace, counted over all stages from 1; None traces
            nothing.
          folder: where the trace goes.
        """
        self._steps, self._folder, self._tracing = steps, folder, False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts or stops the trace; call it before each step."""
        if self._steps is None:
            return
        if self._tracing and step > self._steps[1]:
            self._stop()
        if step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            logging.info("trace: %s (tensorboard --logdir %s)", self._folder, self._folder)


def parse_steps(text: str) -> tuple[int, int] | None:
    """Reads `FIRST:LAST`; an empty text is None.

    Raises:
      ValueError: another form, or a last step before the first.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--profile_steps {text!r}: give FIRST:LAST, such as 10:13")
    return int(match[1]), int(match[2])
