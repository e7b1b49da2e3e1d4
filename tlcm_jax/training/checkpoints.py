"""Checkpoints of a run: everything that a resumed run needs to repeat it bit for bit.

A checkpoint holds the trained parameters, the optimisers' states, the step and key of the stage,
and where the run stands. Leaves are stored flat under their path
(`networks/student/params/down_blocks.0/...`), so what is restored is compared name by name. The
only file that knows Orbax.

Each has a list of its files' sums (`training.integrity`). A run goes on from the newest checkpoint
whose files are still what was saved; newer ones that are not are set aside as `NUMBER.damaged`.
"""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from tlcm_jax.training import integrity
from tlcm_jax.training.leaves import compare, flatten, unflatten
from tlcm_jax.training.positions import (
    POSITION,
    Position,
    describe,
    newest_of_all,
    newest_whole,
    read_position,
    read_record,
    set_aside,
)
from tlcm_jax.training.retention import Keep, Record, metric_of, surplus
from tlcm_jax.training.state import STUDENT, TrainState
from tlcm_jax.training.workdir import is_full

_STATE = "state"
# Of the names that Orbax gives to what it is still writing.
_UNNAMED = ".orbax-checkpoint-tmp"
KEEP = Keep()


class Checkpoints:
    """The checkpoints of one folder.

    A checkpoint is written under a temporary name and renamed when it is whole, so one that was
    interrupted is never chosen. It is written in the background: `save` returns when the state is
    copied, and the next `save`, or `wait`, says what went wrong with the one before.
    """

    def __init__(self, directory: str | Path, keep: Keep | None = KEEP):
        """Opens a folder of checkpoints.

        Args:
          directory: the folder; made if it is missing.
          keep: which to keep. None opens the folder for reading only, and leaves alone what a run
            that is still going has half written there.
        """
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._saving = 0
        self._records: dict[int, Record] = {}
        if keep is None:
            options = ocp.CheckpointManagerOptions(
                read_only=True, save_interval_steps=0, create=False
            )
        else:
            listed = ocp.options.AsyncOptions(post_finalization_callback=self._list_files)
            options = ocp.CheckpointManagerOptions(
                enable_async_checkpointing=True, cleanup_tmp_directories=True, async_options=listed
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                _STATE: ocp.StandardCheckpointHandler(),
                POSITION: ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> Position | None:
        """The position of the newest checkpoint that is whole, or None when there is none.

        Newer ones that are damaged are set aside, with a warning.

        Raises:
          RuntimeError: all there are are damaged.
          ValueError: the newest was written by a newer version.
        """
        if self._keep and jax.process_index() == 0:
            for number in self._named():
                integrity.remove_unfinished(self._path(number))
        total, damaged = newest_of_all(self.directory, self._named())
        if total is None and damaged:
            newest = max(damaged)
            raise RuntimeError(
                f"no checkpoint in {self.directory} can be read ({newest}: {damaged[newest]}): "
                "bring one back from a copy, or remove that folder to start again"
            )
        for number, reason in damaged.items():
            where = f"set aside as {number}.damaged" if self._keep else "left out"
            logging.warning("checkpoint %s is damaged (%s): %s, and %d taken in its place",
                            self._path(number), reason, where, total)  # fmt: skip
            if self._keep and jax.process_index() == 0:
                set_aside(self._path(number))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint chosen")
        self._manager.reload()
        if total is None:
            return None
        best = self._keep.best if self._keep else ""
        read = (read_record(self._path(number), best) for number in self._manager.all_steps())
        self._records = {record.total: record for record in read if record is not None}
        return read_position(self._path(total))

    def _path(self, total: int) -> Path:
        return self.directory / str(total)

    def last_good(self) -> str:
        """Names the newest whole checkpoint, for messages."""
        named = self._named()
        return str(self._path(named[-1])) if named else f"none yet in {self.directory}"

    def _named(self) -> list[int]:
        # As the disk has it: one that is still being written has another name there.
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def save(
        self,
        position: Position,
        state: TrainState,
        *,
        stage_end: bool = False,
        row: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a checkpoint, and drops those that are not to be kept once it is on the disk.

        Args:
          position: where the run stands; one with the total of the newest is already saved.
          state: the state there. It is read before this returns, so it may be donated after.
          stage_end: whether it is the stage's last.
          row: the row of metrics that ends there, for `Keep.best`.

        Raises:
          OSError: no space is left, now or for the save before (naming the last good checkpoint,
            which is kept).
          RuntimeError: newer checkpoints exist than this one.
        """
        self.wait()
        newest = self._manager.latest_step()
        if newest == position.total:
            return
        if newest is not None and newest > position.total:
            raise RuntimeError(
                f"step {position.total} was not saved: {self.directory} already holds step "
                f"{newest}; use another workdir"
            )
        if jax.default_backend() == "cpu":
            # There "copied to the host" is the array itself, which the next update overwrites.
            state = jax.tree.map(jnp.copy, state)
        keep = self._keep or KEEP
        record = Record(
            total=position.total, stage_end=stage_end, metric=metric_of(row or {}, keep)
        )
        self._records[position.total] = record
        args = ocp.args.Composite(
            **{
                _STATE: ocp.args.StandardSave(flatten(state)),
                POSITION: ocp.args.JsonSave(describe(position, record, keep.best)),
            }
        )
        self._saving = position.total
        try:
            saved = self._manager.save(position.total, args=args, force=True)
        except Exception as error:
            raise self._not_saved(error) from error
        if not saved:
            raise RuntimeError(f"Orbax declined to save step {position.total} in {self.directory}")

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
          OSError: no space was left for it.
        """
        try:
            self._manager.wait_until_finished()
            if self._saving and jax.process_index() == 0:
                integrity.add_late_sums(self._path(self._saving))
        except Exception as error:
            raise self._not_saved(error) from error
        if self._saving and self._keep is not None:
            there = set(self._manager.all_steps())
            self._records = {n: r for n, r in self._records.items() if n in there}
            known = [self._records.get(n, Record(total=n)) for n in there]
            for number in surplus(known, self._keep):
                self._manager.delete(number)
        self._saving = 0

    def commit(self) -> None:
        """As `wait`, for another thread than the one that saves, before the process ends."""
        self._manager.wait_until_finished()

    def _list_files(self) -> None:
        """Called by Orbax, in the background, when all files are final and have no name yet."""
        for folder in self.directory.glob(f"{self._saving}{_UNNAMED}*"):
            integrity.write_sums(folder)

    def _not_saved(self, error: Exception) -> Exception:
        if not is_full(error):
            return error
        return OSError(
            errno.ENOSPC,
            f"no space left on the device for the checkpoint of step {self._saving}; the last "
            f"good checkpoint is {self.last_good()}: free some space and run the same command to "
            f"resume from it",
        )

    def restore(self, template: TrainState) -> TrainState:
        """Restores the newest checkpoint exactly.

        Args:
          template: a state of arrays or `jax.ShapeDtypeStruct`s with the structure, shapes and
            types expected, and the shardings wanted: the checkpoint may have been written on
            another mesh or number of devices.

        Returns:
          The state as it was saved, on the template's shardings.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: the checkpoint holds other leaves than the template, shapes or types
            included; the message names them.
          RuntimeError: its files are damaged.
        """
        total = self._manager.latest_step()
        if total is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        wanted = flatten(template)
        try:
            stored = dict(self._manager.item_metadata(total)[_STATE].items())
        except Exception as error:
            raise self._unreadable(total, error) from error
        compare(wanted, stored, self._path(total))
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(wanted)})
        try:
            leaves = self._manager.restore(total, args=args)[_STATE]
        except Exception as error:
            raise self._unreadable(total, error) from error
        return unflatten(template, leaves)

    def trained(self, total: int | None = None) -> dict[str, Any]:
        """What a checkpoint leaves to sampling and export alone: the EMA, or else the parameters.

        Args:
          total: number of the checkpoint; the newest by default.

        Returns:
          Nested dicts of numpy arrays, by the names that the leaves were saved under.

        Raises:
          FileNotFoundError: no such checkpoint; names those there are.
          RuntimeError: its files are damaged.
        """
        there = self._named()
        if not there or (total is not None and total not in there):
            wished = "" if total is None else f" {total}"
            found = f"it has {', '.join(map(str, there))}" if there else "it has none"
            raise FileNotFoundError(f"no checkpoint{wished} in {self.directory}: {found}")
        total = self._newest(there) if total is None else total
        path = self._path(total)
        if integrity.has_sums(path) and (reason := integrity.damage(path)):
            raise self._unreadable(total, ValueError(reason))
        try:
            stored = self._manager.item_metadata(total)[_STATE].items()
            student = f"networks/{STUDENT}/"
            averaged = any(name.startswith(f"{student}ema/") for name, _ in stored)
            prefix = student + ("ema/" if averaged else "params/")
            wanted = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                for name, leaf in stored
                if name.startswith(prefix)
            }
            host = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
            args = ocp.args.PyTreeRestore(wanted, restore_args=host, partial_restore=True)
            with ocp.PyTreeCheckpointer() as reader:
                leaves = reader.restore(path / _STATE, args=args)
        except Exception as error:
            raise self._unreadable(total, error) from error
        tree: dict[str, Any] = {}
        for name, value in leaves.items():
            *folders, last = name.removeprefix(prefix).split("/")
            branch = tree
            for folder in folders:
                branch = branch.setdefault(folder, {})
            branch[last] = value
        return tree

    def _newest(self, there: list[int]) -> int:
        """The newest that is whole, with a warning where a newer one is not."""
        total, damaged = newest_whole(self.directory, there)
        if total is None:
            raise self._unreadable(there[-1], ValueError(damaged[there[-1]]))
        for number, reason in damaged.items():
            logging.warning("checkpoint %s is damaged (%s): taking %d", number, reason, total)
        return total

    def close(self) -> None:
        """Waits for what is being saved, and releases the folder.

        Raises:
          OSError: no space was left for it.
        """
        try:
            self._manager.close()
            if self._saving and jax.process_index() == 0:
                integrity.add_late_sums(self._path(self._saving))
        except Exception as error:
            raise self._not_saved(error) from error

    def _unreadable(self, total: int, error: Exception) -> RuntimeError:
        path = self.directory / str(total)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        older = [step for step in self._manager.all_steps() if step < total]
        then = f"resume from step {max(older)}" if older else "start again"
        return RuntimeError(
            f"checkpoint {path} cannot be read ({reason[0]}): remove that folder to {then}"
        )
