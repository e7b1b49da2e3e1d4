"""The size of images in pixels, as people give it: `1216x832`, or one number for a square."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class ImageSize:
    """Height and width in pixels; as text width first, `1216x832`, as image sizes are written."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def is_square(self) -> bool:
        """Whether height and width are one."""
        return self.height == self.width

    @classmethod
    def read(cls, given: "Resolution") -> "ImageSize | None":
        """A size from text, the side of a square, or a size; None and 0 are the model's own: None.

        Raises:
          ValueError: it is no size.
        """
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, int) and not isinstance(given, bool):
            height = width = given
        elif isinstance(given, str) and (found := re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", given)):
            width = int(found[1])
            height = int(found[2] or width)
        else:
            raise ValueError(
                f"resolution {given!r}: give WIDTHxHEIGHT in pixels, such as 1216x832, or one "
                "number for a square"
            )
        if not height and not width:
            return None
        if height < 1 or width < 1:
            raise ValueError(f"resolution {given}: must be at least 1, or 0 for the model's own")
        return cls(height=height, width=width)

    def check(self, factor: int) -> None:
        """Refuses what is no multiple of `factor`, the autoencoder's, along both sides.

        Raises:
          ValueError: naming the nearest that is.
        """
        if self.height % factor or self.width % factor:
            height, width = (
                max(factor, (side + factor // 2) // factor * factor)
                for side in (self.height, self.width)
            )
            nearest = ImageSize(height=height, width=width)
            raise ValueError(
                f"resolution {self._short()} must be a multiple of {factor}: the nearest is "
                f"{nearest._short()}"
            )

    def _short(self) -> str:
        return str(self.height) if self.is_square else str(self)


# How a size may be given; None and 0 are the model's own.
Resolution = ImageSize | int | str | None
