"""Keeps a second run off a workdir.

Two things say that a folder is taken. The system's lock on `.lock` (`flock`) does at once, between
processes of one machine and, on file systems that pass it on (NFS), of several; it ends with its
process, so a dead run leaves none behind. A mounted bucket passes no locks on: for that the file
also says who holds it, and the holder writes a new beat into it every `BEAT` seconds. A run that
finds another machine's name there watches for `WATCH` seconds whether it still beats.

What cannot be known: over a bucket, two runs of two machines that begin within the same
`WATCH` seconds may both find the folder free. Each notices the other's name at its next beat, and
the one whose name is gone ends.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from absl import logging

LOCK_FILE = ".lock"
# Above the time for which mounted buckets answer from memory (gcsfuse: 60 s).
BEAT, WATCH = 20.0, 90.0


class WorkdirInUseError(RuntimeError):
    """Another run holds the folder."""


class WorkdirLock:
    """A context in which a workdir is this run's; `check` says whether it still is."""

    def __init__(self, workdir: str | os.PathLike, beat: float = BEAT, watch: float = WATCH):
        """Takes nothing yet.

        Args:
          workdir: the run's folder; made if it is missing.
          beat: seconds between signs of life.
          watch: seconds that another machine's name is watched for one.
        """
        self._path = Path(workdir) / LOCK_FILE
        self._beat, self._watch = beat, watch
        self._host = socket.gethostname()
        self._handle: int | None = None
        self._count = 0
        self._lost = ""
        self._made = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "WorkdirLock":
        """Takes the folder.

        Raises:
          WorkdirInUseError: another run holds it.
          OSError: it cannot be written.
        """
        self._made = not self._path.parent.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._in_use(self._read()) from None
            except OSError:  # a file system without locks: the name and its beat are all there is
                logging.warning("%s: this file system has no locks", self._path)
            self._wait_for_silence()
            self._write()
        except BaseException:
            os.close(self._handle)
            raise
        self._thread = threading.Thread(target=self._keep_beating, name="workdir lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._handle is not None:
            with contextlib.suppress(OSError):
                if not self._lost:
                    self._path.write_text("")
                # A run that was refused for its input leaves no folder behind.
                if self._made and os.listdir(self._path.parent) == [self._path.name]:
                    self._path.unlink()
                    self._path.parent.rmdir()
            os.close(self._handle)
            self._handle = None

    def check(self) -> None:
        """Raises a `WorkdirInUseError` if another run has taken the folder in the meantime."""
        if self._lost:
            raise WorkdirInUseError(
                f"{self._path.parent} has been taken by {self._lost}: this run ends, and that one "
                "goes on"
            )

    def _wait_for_silence(self) -> None:
        before = self._read()
        # Of this machine the system's own lock has said that nobody holds it.
        if not before or before.get("host") == self._host:
            return
        logging.warning(
            "%s was last held by %s: watching for %.0f s whether it still is",
            self._path.parent, _holder(before), self._watch,
        )  # fmt: skip
        until = time.monotonic() + self._watch
        while time.monotonic() < until:
            time.sleep(min(1.0, self._watch / 10))
            now = self._read()
            if not now:
                return
            if now != before:
                raise self._in_use(now)

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat):
            try:
                there = self._read()
                if there and not self._own(there):
                    self._lost = _holder(there)
                    return
                self._write()
            except OSError as error:
                logging.warning("%s cannot be written: %s", self._path, error)

    def _own(self, there: dict[str, Any]) -> bool:
        return (there.get("host"), there.get("process")) == (self._host, os.getpid())

    def _write(self) -> None:
        self._count += 1
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        about = {"host": self._host, "process": os.getpid(), "beat": self._count, "at": since}
        self._path.write_text(json.dumps(about) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        """Who holds it by the file; nothing where that cannot be read."""
        try:
            there = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return there if isinstance(there, dict) else {}

    def _in_use(self, there: dict[str, Any]) -> WorkdirInUseError:
        return WorkdirInUseError(
            f"{self._path.parent} is in use by {_holder(there)}: wait for it, stop it, or use "
            "another workdir"
        )


def _holder(there: dict[str, Any]) -> str:
    if not there:
        return "another run"
    return f"process {there.get('process')} on {there.get('host')} (alive at {there.get('at')})"
