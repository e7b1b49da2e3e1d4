"""The flags by which commands are given the size of images; nothing of JAX is imported."""

from absl import flags

from tlcm_jax.io.image_size import ImageSize

# They are the flags of the command that defines them, and stand in its --help.
flags.disclaim_key_flags()


def define_size_flags(values: flags.FlagValues, default: str) -> None:
    """Defines `--resolution`, `--height` and `--width`.

    Args:
      values: where.
      default: what holds without them, in words.
    """
    where = {"flag_values": values}
    shape = f"WIDTHxHEIGHT in pixels, or a square's side; {default}."
    flags.DEFINE_string("resolution", None, shape, **where)
    flags.DEFINE_integer("height", None, "In pixels, with --width.", lower_bound=1, **where)
    flags.DEFINE_integer("width", None, "In pixels, with --height.", lower_bound=1, **where)


def given_size(values: flags.FlagValues) -> ImageSize | None:
    """The size that the flags give; None without.

    Raises:
      ValueError: they give none, or two.
    """
    sides = (values.height, values.width)
    if sides == (None, None):
        try:
            return ImageSize.read(values.resolution)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
    if None in sides or values.resolution is not None:
        raise ValueError("give --height and --width, or --resolution WIDTHxHEIGHT")
    return ImageSize(height=values.height, width=values.width)
