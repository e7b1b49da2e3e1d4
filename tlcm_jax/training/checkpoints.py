"""Checkpoints of a run: everything that a resumed run needs to repeat it bit for bit.

A checkpoint holds the trained parameters, the optimisers' states, the step and key of the stage,
and where the run stands. Leaves are stored flat under their path
(`networks/student/params/down_blocks.0/...`), so what is restored is compared name by name. The
only file that knows Orbax.
"""

import dataclasses
import errno
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tlcm_jax.training.sharding import leaf_name
from tlcm_jax.training.state import STUDENT, TrainState
from tlcm_jax.training.workdir import is_full

_STATE, _POSITION = "state", "position"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands, between two steps.

    Attributes:
      stage: index of the stage.
      name: its name.
      step: steps of the stage that are done. It is also the position in the stage's data: batch
        k is drawn for step k, so the next batch is number `step`.
      total: steps of all stages that are done; numbers checkpoints and metrics.
    """

    stage: int
    name: str
    step: int
    total: int


class Checkpoints:
    """The checkpoints of one folder; the newest few are kept.

    A checkpoint is written under a temporary name and renamed when it is whole, so one that was
    interrupted is never chosen. It is written in the background: `save` returns when the state is
    copied, and the next `save`, or `wait`, says what went wrong with the one before.
    """

    def __init__(self, directory: str | Path, keep: int | None = 2):
        """Opens a folder of checkpoints.

        Args:
          directory: the folder; made if it is missing.
          keep: how many to keep, the newest. None opens the folder for reading only, and leaves
            alone what a run that is still going has half written there.
        """
        self.directory = Path(directory).absolute()
        self._saving = 0
        if keep is None:
            options = ocp.CheckpointManagerOptions(
                read_only=True, save_interval_steps=0, create=False
            )
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                _STATE: ocp.StandardCheckpointHandler(),
                _POSITION: ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> Position | None:
        """The newest checkpoint's position, or None when there is none."""
        total = self._manager.latest_step()
        if total is None:
            return None
        args = ocp.args.Composite(**{_POSITION: ocp.args.JsonRestore()})
        try:
            return Position(**self._manager.restore(total, args=args)[_POSITION])
        except Exception as error:
            raise self._unreadable(total, error) from error

    def last_good(self) -> str:
        """Names the newest whole checkpoint, for messages."""
        # As the disk has it: one that is still being written has another name there.
        whole = [int(path.name) for path in self.directory.iterdir() if path.name.isdigit()]
        if not whole:
            return f"none yet in {self.directory}"
        return str(self.directory / str(max(whole)))

    def save(self, position: Position, state: TrainState) -> None:
        """Saves a checkpoint and drops the ones that are too old.

        Args:
          position: where the run stands; one with the total of the newest is already saved.
          state: the state there. It is read before this returns, so it may be donated after.

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
        args = ocp.args.Composite(
            **{
                _STATE: ocp.args.StandardSave(_flatten(state)),
                _POSITION: ocp.args.JsonSave(dataclasses.asdict(position)),
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
        except Exception as error:
            raise self._not_saved(error) from error

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
        wanted = _flatten(template)
        try:
            stored = dict(self._manager.item_metadata(total)[_STATE].items())
        except Exception as error:
            raise self._unreadable(total, error) from error
        _compare(wanted, stored, self.directory / str(total))
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(wanted)})
        try:
            leaves = self._manager.restore(total, args=args)[_STATE]
        except Exception as error:
            raise self._unreadable(total, error) from error
        return _unflatten(template, leaves)

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
        there = sorted(self._manager.all_steps())
        if not there or (total is not None and total not in there):
            wished = "" if total is None else f" {total}"
            found = f"it has {', '.join(map(str, there))}" if there else "it has none"
            raise FileNotFoundError(f"no checkpoint{wished} in {self.directory}: {found}")
        total = there[-1] if total is None else total
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
                leaves = reader.restore(self.directory / str(total) / _STATE, args=args)
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

    def close(self) -> None:
        """Waits for what is being saved, and releases the folder."""
        self._manager.close()

    def _unreadable(self, total: int, error: Exception) -> RuntimeError:
        path = self.directory / str(total)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        older = [step for step in self._manager.all_steps() if step < total]
        then = f"resume from step {max(older)}" if older else "start again"
        return RuntimeError(
            f"checkpoint {path} cannot be read ({reason[0]}): remove that folder to {then}"
        )


def _flatten(state: TrainState) -> dict[str, Any]:
    """Leaves by name; the key as its data, and shapes as `jax.ShapeDtypeStruct`s."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = leaf_name(path)
        if name in flat:
            raise ValueError(f"two leaves of the state are called {name!r}: rename one")
        flat[name] = _key_data(leaf) if _is_key(leaf) else leaf
    return flat


def _unflatten(template: TrainState, leaves: dict[str, Any]) -> TrainState:
    def pick(path: tuple, leaf: Any) -> Any:
        value = leaves[leaf_name(path)]
        if not _is_key(leaf):
            return value
        return jax.random.wrap_key_data(value, impl=_key_impl(leaf))

    return jax.tree_util.tree_map_with_path(pick, template)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _key_impl(leaf: Any) -> Any:
    # Asked of a tracer: only keys that are arrays have an implementation to ask for.
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _compare(wanted: dict[str, Any], stored: dict[str, Any], path: Path) -> None:
    problems = [f"{name}: not in the checkpoint" for name in sorted(set(wanted) - set(stored))]
    problems += [f"{name}: only in the checkpoint" for name in sorted(set(stored) - set(wanted))]
    for name in sorted(set(wanted) & set(stored)):
        here = (tuple(wanted[name].shape), np.dtype(wanted[name].dtype))
        there = (tuple(stored[name].shape), np.dtype(stored[name].dtype))
        if here != there:
            problems.append(
                f"{name}: {there[1]}{list(there[0])} in the checkpoint, {here[1]}{list(here[0])} "
                f"in this run"
            )
    if problems:
        shown = "".join(f"\n  {line}" for line in problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"checkpoint {path} does not fit this run's state; use the config it was made with, "
            f"or another workdir:{shown}{more}"
        )
