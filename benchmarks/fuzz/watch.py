"""What a reader may do with a damaged file: succeed, or refuse it in one line; nothing else.

outcome      what it was
ok           read
refused      ValueError or OSError, of one line: what the commands print
trace        any other exception, or a message of several lines
hang         over the limit of seconds of the processor, or twenty times that by the clock
memory       resident memory grew beyond 2 x the input + 200 MB
escape       something was written outside the folder, run, or asked of the network
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LIMIT = 20.0  # seconds
_BESIDE = 200 * 2**20
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of the interpreter that no reader has a use for.
_NEVER = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class",
          "socket.connect", "os.symlink", "os.link")  # fmt: skip
_PATHS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


class Hang(BaseException):
    """Raised in a reader that does not end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended: a word of the table above, and what was said."""

    kind: str
    text: str = ""

    @property
    def good(self) -> bool:
        """Whether it may end so."""
        return self.kind in ("ok", "refused")


class Guard:
    """Watches what is written, run and asked; one a process, since hooks cannot be taken away."""

    def __init__(self) -> None:
        self._inside: tuple[str, ...] | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self, *folders: Path) -> Iterator[None]:
        """Collects in `seen` what goes on outside the folders."""
        self.seen = []
        self._inside = tuple(os.path.realpath(folder) for folder in folders)
        try:
            yield
        finally:
            self._inside = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._inside is None:
            return
        if event in _NEVER:
            self.seen.append(f"{event} {arguments[:1]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            mode, flags = arguments[1] or "", arguments[2] or 0
            if set(mode) & set("wax+") or flags & _WRITES:
                self._write(event, arguments[0])
        elif event in _PATHS and -1 in arguments[1:] + (-1,) * (len(arguments) == 1):
            self._write(event, arguments[0])  # not of an open folder, as rmtree does it

    def _write(self, event: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        real = os.path.realpath(os.fsdecode(path))
        if not real.startswith(self._inside or ()) and not real.endswith(".pyc"):
            if real not in ("/dev/null", "/proc/self/clear_refs"):
                self.seen.append(f"{event} {real}")


def run(
    read: Callable[[], Any], size: int, guard: Guard, *folders: Path, limit: float = LIMIT
) -> Outcome:
    """Runs a reader.

    Args:
      read: reads.
      size: of what it reads, in bytes.
      guard: of this process.
      folders: where it may write.
      limit: in seconds.
    """
    before = _reset_peak()
    ends = time.process_time() + limit, time.monotonic() + 20 * limit
    active = True

    def look(*_: Any) -> None:
        if active and (time.process_time() > ends[0] or time.monotonic() > ends[1]):
            raise Hang

    signal.signal(signal.SIGALRM, look)
    outcome = Outcome(kind="ok")
    with guard.watching(*folders):
        signal.setitimer(signal.ITIMER_REAL, limit / 4, limit / 4)
        try:
            read()
        except (ValueError, OSError) as error:
            text = str(error)
            outcome = Outcome(kind="refused", text=text)
            if "\n" in text.strip():
                outcome = Outcome(kind="trace", text=f"of several lines: {text[:500]}")
        except Hang:
            outcome = Outcome(kind="hang", text=traceback.format_exc()[-1500:])
        except KeyboardInterrupt:
            raise
        except BaseException:  # whatever a library panics with, too
            outcome = Outcome(kind="trace", text=traceback.format_exc()[-2500:])
        finally:
            active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    if guard.seen:
        return Outcome(kind="escape", text="; ".join(guard.seen[:5]))
    grown = _peak() - before
    if grown > 2 * size + _BESIDE:
        return Outcome(kind="memory", text=f"{grown / 2**20:.0f} MB for {size} bytes")
    return outcome


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def _reset_peak() -> int:
    """Resident bytes now; the peak is counted from here."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")
