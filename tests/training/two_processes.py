"""One process of a distributed toy run; started by test_distributed with its environment."""

import sys
from pathlib import Path

import jax
import numpy as np

from tlcm_jax.training.distributed import initialize

started = initialize()  # before toy_regression: importing a stage must not be what starts JAX

import toy_regression as toy  # noqa: E402

from tlcm_jax.training import mesh  # noqa: E402


def main(folder: Path) -> None:
    assert started and initialize(), "not distributed"
    rank, processes = jax.process_index(), jax.process_count()
    on = mesh.make_mesh({"data": -1, "fsdp": 2})
    rows = toy.PROMPTS // processes
    mine = slice(rank * rows, (rank + 1) * rows)

    def batches(r):
        local = {name: leaf[mine] for name, leaf in toy.host_batch(r).items()}
        return mesh.shard_batch(on, local)

    spec = toy.spec(steps=3, on=on, batches=batches)
    result = toy.run(folder, [spec], on, write=rank == 0)
    losses = np.array([row["loss"] for row in result.history])
    np.save(folder / f"losses{rank}.npy", losses)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
