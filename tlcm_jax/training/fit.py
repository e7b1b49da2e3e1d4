"""A small training loop for single networks, such as scorers: AdamW, EMA, resume."""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

Params = Any
LossFn = Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def cosine(peak: float, steps: int, warmup: int = 100) -> optax.Schedule:
    """Linear warm-up, then a cosine to zero at `steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)


def trapezoid(peak: float, steps: int, warmup: int = 200, decay: float = 0.15) -> optax.Schedule:
    """Linear warm-up, a plateau, and a linear fall to zero over the last share of the steps.

    A run may be stopped on the plateau and resumed with another number of steps.
    """
    fall = int(decay * steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, fall),
        ],
        [warmup, steps - fall],
    )


def fit(
    loss_fn: LossFn,
    params: Params,
    batches: Iterator | Callable[[int], Iterator],
    *,
    steps: int,
    learning_rate: optax.Schedule,
    workdir: Path,
    weight_decay: float = 1e-2,
    ema_decay: float = 0.999,
    seed: int = 0,
    log_every: int = 100,
    save_every: int = 500,
    report: Callable[[int, Params], None] | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Params:
    """Trains and returns the exponential moving average of the parameters.

    Args:
      loss_fn: `(params, batch, key) -> (scalar loss, metrics)`.
      params: initial parameters, fp32.
      batches: one batch (a pytree of arrays) a step; or what makes these from a step on.
      steps: optimiser steps in all.
      learning_rate: over the steps; `cosine` or `trapezoid`.
      workdir: where checkpoints go; a second call with the same folder goes on from the last.
      weight_decay: AdamW's.
      ema_decay: decay of the average; its early steps are shortened, so that it forgets the start.
      seed: of the keys given to `loss_fn`.
      log_every: steps between lines of metrics.
      save_every: steps between checkpoints (and between calls of `report`).
      report: called with the step and the averaged parameters after each checkpoint.
      optimizer: another than clipped AdamW; `learning_rate` and `weight_decay` are then its own.
    """
    optimizer = optimizer or optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=weight_decay)
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: dict, batch: Any) -> tuple[dict, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state["params"], batch, key
        )
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        new = optax.apply_updates(state["params"], updates)
        decay = jnp.minimum(ema_decay, (1 + state["step"]) / (10 + state["step"]))
        average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state["ema"], new)
        state = dict(step=state["step"] + 1, params=new, optimizer=optimizer_state, ema=average)
        return state, {"loss": loss, **metrics}

    state = dict(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params),
    )
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(Path(workdir).resolve(), options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        first, started = int(state["step"]), time.monotonic()
        stream = batches(first) if callable(batches) else batches
        bar = tqdm(range(first, steps), initial=first, total=steps, mininterval=10)
        for step in bar:
            state, metrics = update(state, next(stream))
            if (step + 1) % log_every == 0:
                shown = {name: f"{float(value):.4f}" for name, value in metrics.items()}
                rate = (step + 1 - first) / (time.monotonic() - started)
                tqdm.write(f"step {step + 1} {shown} {rate:.2f} steps/s")
            if (step + 1) % save_every == 0 or step + 1 == steps:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
                if report:
                    report(step + 1, state["ema"])
    return state["ema"]
