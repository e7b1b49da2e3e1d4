"""One process of a distributed toy run; started by test_distributed with its environment."""

import sys
from pathlib import Path

import jax
import numpy as np

from tlcm_jax.training.distributed import initialize

started = initialize()  # before toy_regression: importing a stage must not be what starts JAX

import toy_regression as toy  # noqa: E402

from tlcm_jax.training import loop, mesh, sharding  # noqa: E402
from tlcm_jax.training.checkpoints import Checkpoints  # noqa: E402
from tlcm_jax.training.metrics import MetricsWriter  # noqa: E402


def main(folder: Path) -> None:
    assert started and initialize(), "not distributed"
    rank, processes = jax.process_index(), jax.process_count()
    on = mesh.make_mesh({"data": -1, "fsdp": 2})
    rows = toy.BATCH // processes
    mine = slice(rank * rows, (rank + 1) * rows)

    def batches(k):
        local = {name: leaf[mine] for name, leaf in toy.host_batch(k).items()}
        return mesh.shard_batch(on, local)

    result = loop.run(
        [toy.stage(steps=3, on=on, batches=batches)],
        toy.trainable(),
        sharding.place(toy.frozen(), on, toy.RULES),
        jax.random.key(1),
        checkpoints=Checkpoints(folder / "checkpoints"),
        writer=MetricsWriter(folder, write=rank == 0),
        settings=loop.LoopSettings(progress=False),
        mesh=on,
        rules=toy.RULES,
    )
    losses = np.array([row["loss"] for row in result.history])
    np.save(folder / f"losses{rank}.npy", losses)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
