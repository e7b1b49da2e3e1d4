"""Stage 1 on the toy: points a path, the paper's paths against node reuse, the loss's space.

    python -m benchmarks.toy [--seeds 0,1,2] [--updates 600] [--rate 1e-3]

A student of every row is trained by the library's own stage 1 (`distillation.mlcd`, M = 8, skip 20,
guidance 3), pairs and updates as in a run (`training.pairs`, `training.update`), all its weights.
What is printed is the distance between where the student's eight segment jumps end and where the
teacher's guided flow does, in 333 steps from the same noise: root mean square over 1 024 points,
mean and standard deviation over seeds. NFE counts forwards a pair as the library does, with paths
of all lengths in lock-step; a row of "equal NFE" has as many in all as the paper's paths.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from benchmarks.toy.world import CLASSES, NULL, denoiser, follow, networks, spread, train_teacher
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.diffusion.timesteps import milestone_indices
from tlcm_jax.distillation.mlcd import MLCD, MLCDSettings
from tlcm_jax.training.pairs import PairSource, PairStream
from tlcm_jax.training.state import create
from tlcm_jax.training.update import make_update

SCALE, BATCH, POINTS = 3.0, 144, 1024
# Refills of about 32 updates: pairs of one path must not meet in one batch.
PAIRS = 32 * BATCH
ROWS = (
    ("the paper's paths", dict(mode="paper"), False),
    ("node reuse, 9 points a path", dict(points_per_segment=1), False),
    ("node reuse, 9 points, equal NFE", dict(points_per_segment=1), True),
    ("node reuse, 17 points", dict(points_per_segment=2), False),
    ("node reuse, 33 points", dict(points_per_segment=4), False),
    ("the paper's paths, loss as x0", dict(mode="paper", loss_space="x0"), False),
    ("node reuse, 33 points, loss as x0", dict(points_per_segment=4, loss_space="x0"), False),
)


def train(
    objective: MLCD, teacher: PyTree[Array], updates: int, rate: float, seed: int
) -> PyTree[Array]:
    """A student's parameters after stage 1, from the teacher's."""
    frozen = {"teacher": teacher}
    # Whole batches of whole paths.
    prompts = BATCH * max(1, PAIRS // objective.pairs_per_prompt // BATCH)
    source = PairSource(
        sample=objective.sample_pairs,
        batches=lambda r: {"conditioning": jnp.arange(r * prompts, (r + 1) * prompts) % CLASSES},
        prompts=prompts,
        pairs_per_prompt=objective.pairs_per_prompt,
        batch_size=BATCH,
    )

    def loss(params: PyTree[Array], frozen: PyTree[Array], pairs: PyTree[Array], keys: Array,
             others: PyTree[Array]) -> tuple[Array, dict[str, Array]]:  # fmt: skip
        del keys, others
        target = objective.target(objective.networks.target(params, frozen), pairs)
        x0 = objective.predict(objective.networks.student(params, frozen), pairs)
        return objective.loss(x0, target, pairs)

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, updates))
    update = make_update(loss, optimizer)
    stream = PairStream(source)
    state = create(jax.tree.map(jnp.array, teacher), optimizer, jax.random.key(seed))
    for step in range(updates):
        state, _ = update(state, frozen, stream.next(step, state, frozen))
    return state.trained


def errors(teacher: PyTree[Array]) -> tuple[Callable[[PyTree[Array]], float], float]:
    """How far a student's chain ends from the flow, given its parameters; and eight DDIM steps."""
    c = jnp.arange(POINTS) % CLASSES
    noise = jax.random.normal(jax.random.key(271828), (POINTS, 2))
    guide = guided(denoiser(teacher), SCALE, lambda c: jnp.full_like(c, NULL))
    milestones = milestone_indices(8)
    flow = jax.jit(lambda z: follow(guide, z, c, tuple(range(999, -1, -3))))(noise)
    ddim = jax.jit(lambda z: follow(guide, z, c, milestones))(noise)
    chain = jax.jit(lambda params: follow(denoiser(params), noise, c, milestones))
    return lambda params: spread(chain(params) - flow), spread(ddim - flow)


def main() -> None:
    """Trains, and prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    start, shared = time.monotonic(), networks()
    found: dict[str, list[float]] = {"the teacher's own DDIM, 8 steps": []}
    counts = {"the teacher's own DDIM, 8 steps": ("–", "–")}
    base = MLCDSettings(guidance_scale=SCALE, mode="paper").build(shared).nfe_per_pair.total
    for seed in map(int, args.seeds.split(",")):
        teacher = train_teacher(jax.random.key(seed))
        distance, ddim = errors(teacher)
        found["the teacher's own DDIM, 8 steps"].append(ddim)
        for name, chosen, equal_nfe in ROWS:
            objective = MLCDSettings(guidance_scale=SCALE, **chosen).build(shared)
            nfe = objective.nfe_per_pair.total
            updates = round(args.updates * base / nfe) if equal_nfe else args.updates
            student = train(objective, teacher, updates, args.rate, seed)
            found.setdefault(name, []).append(distance(student))
            counts[name] = (f"{updates}", f"{nfe:g}")
    print(f"| learning rate {args.rate:g} | updates of {BATCH} | NFE a pair | distance |")
    print("|---|---:|---:|---:|")
    for name, values in found.items():
        told = f"{statistics.fmean(values):.4f}"
        if len(values) > 1:
            told += f" ± {statistics.stdev(values):.4f}"
        print(f"| {name} | {' | '.join(counts[name])} | {told} |")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
