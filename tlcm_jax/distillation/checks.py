"""What settings may be: each check raises a ValueError that names the setting and its bounds."""

from tlcm_jax.diffusion.process import Process
from tlcm_jax.diffusion.timesteps import shortest_segment


def check_at_least(name: str, value: int | float, low: int | float) -> None:
    """Raises a ValueError if a setting is less than `low`."""
    if not value >= low:
        raise ValueError(f"{name} = {value}: must be at least {low}")


def check_positive(name: str, value: int | float) -> None:
    """Raises a ValueError if a setting is not greater than 0."""
    if not value > 0:
        raise ValueError(f"{name} = {value}: must be greater than 0")


def check_at_most(name: str, value: int | float, high: int | float, reason: str) -> None:
    """Raises a ValueError if a setting is more than `high`, and says why it may not be."""
    if not value <= high:
        raise ValueError(f"{name} = {value}: must be at most {high}, {reason}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError if a setting is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(choices)}")


def check_segments(process: Process, segments: int, name: str, steps: int) -> None:
    """Raises a ValueError unless `segments` cut the time axis evenly, each as long as `steps`.

    Args:
      process: whose time axis it is.
      segments: M.
      name: of the setting that says how often a path stops in a segment.
      steps: its value.
    """
    total = process.num_train_timesteps
    if total % segments:
        divisors = [n for n in range(1, total + 1) if total % n == 0]
        below, above = (
            max(n for n in divisors if n < segments),
            min(n for n in divisors if n > segments),
        )
        raise ValueError(
            f"segments = {segments}: must divide the {total} times of the schedule, as {below} and "
            f"{above} do"
        )
    reason = f"the shortest of {segments} segments of {total} times"
    check_at_most(name, steps, shortest_segment(segments, total), reason)
