"""The optimiser of every stage: AdamW behind a clip by global norm.

Paper's values, and the defaults here: AdamW(0.9, 0.999), no weight decay, clip 1.0, constant
learning rate after a linear warm-up. All counts are optimiser updates, of which one training
step may make several.
"""

import optax


def learning_rate_schedule(
    learning_rate: float,
    *,
    warmup_updates: int = 0,
    decay: str = "constant",
    total_updates: int | None = None,
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Linear warm-up, then a constant or a decaying learning rate.

    Args:
      learning_rate: the rate after the warm-up.
      warmup_updates: updates over which the rate rises linearly. The first update already moves:
        it uses `learning_rate / warmup_updates`.
      decay: `constant`, `cosine` or `linear`.
      total_updates: update at which the decay ends; needed unless `decay` is `constant`.
      final_fraction: the rate at `total_updates`, as a fraction of `learning_rate`.

    Returns:
      A function from the number of updates done to the learning rate.

    Raises:
      ValueError: an unknown `decay`, or a decay that ends before the warm-up does.
    """
    if decay == "constant":
        after = optax.constant_schedule(learning_rate)
    elif decay in ("cosine", "linear"):
        if total_updates is None or total_updates <= warmup_updates:
            raise ValueError(
                f"a {decay} decay needs more updates in all than the {warmup_updates} of the "
                f"warm-up, got {total_updates}: lower the warm-up or use decay='constant'"
            )
        span = total_updates - warmup_updates
        if decay == "cosine":
            after = optax.cosine_decay_schedule(learning_rate, span, alpha=final_fraction)
        else:
            after = optax.linear_schedule(learning_rate, learning_rate * final_fraction, span)
    else:
        raise ValueError(f"unknown decay {decay!r}: use 'constant', 'cosine' or 'linear'")
    if warmup_updates <= 0:
        return after
    # Starts one step up the ramp: an update at rate 0 would spend a whole batch on nothing.
    ramp = optax.linear_schedule(
        learning_rate / warmup_updates, learning_rate, max(warmup_updates - 1, 1)
    )
    return optax.join_schedules([ramp, after], [warmup_updates])


def adamw(
    learning_rate: float,
    *,
    warmup_updates: int = 0,
    decay: str = "constant",
    total_updates: int | None = None,
    final_fraction: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with the gradient clipped by its global norm first.

    Args:
      learning_rate: see `learning_rate_schedule`, as are the next four.
      warmup_updates: updates of linear warm-up.
      decay: `constant`, `cosine` or `linear`.
      total_updates: where the decay ends.
      final_fraction: what the decay leaves of the rate.
      b1: decay of the first moment (0 for a discriminator).
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled weight decay.
      max_grad_norm: global norm above which a gradient is scaled down to it.

    Returns:
      An optax transformation.

    Raises:
      ValueError: a learning rate or clip that is not positive, or as in `learning_rate_schedule`.
    """
    if learning_rate <= 0 or max_grad_norm <= 0:
        raise ValueError(
            f"learning_rate and max_grad_norm must be positive, got {learning_rate} and "
            f"{max_grad_norm}"
        )
    schedule = learning_rate_schedule(
        learning_rate,
        warmup_updates=warmup_updates,
        decay=decay,
        total_updates=total_updates,
        final_fraction=final_fraction,
    )
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )
