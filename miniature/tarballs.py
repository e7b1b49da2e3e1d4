"""The five npm tarballs that the emoji come from, read in place.

Nothing is unpacked to disk: members are read by exact name into memory, so that a hostile path or
link inside an archive has nowhere to go.
"""

import json
import pathlib
import tarfile
import zlib
from typing import Any

LABELS = "emojibase-data-17.0.0.tgz"
# Style name -> tarball, in the order of the style ids.
IMAGES = {
    "fluent-3d": "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "noto": "iconify-json-noto-1.2.9.tgz",
    "fluent-flat": "iconify-json-fluent-emoji-flat-1.2.6.tgz",
    "twemoji": "iconify-json-twemoji-1.2.5.tgz",
}
STYLES = tuple(IMAGES)
PACKAGES = (
    "emojibase-data@17.0.0",
    "@lobehub/fluent-emoji-3d@1.1.0",
    "@iconify-json/noto@1.2.9",
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@iconify-json/twemoji@1.2.5",
)
_LARGEST_MEMBER = 64 * 2**20  # bytes; the largest real one, Noto's icons.json, has 17 MiB
_DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error)


class Tarball:
    """Regular files of one npm tarball, by their path below `package/`.

    Args:
      path: the `.tgz` file, as `npm pack` writes it.

    Raises:
      FileNotFoundError: there is no such file; the message holds the command that fetches it.
      ValueError: the file is not a readable gzip tar archive.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: fetch the emoji with `bash miniature/fetch.sh {path.parent}`"
            )
        try:
            with tarfile.open(path, "r:gz") as archive:
                self._members = {m.name.removeprefix("package/"): m for m in archive if m.isreg()}
        except _DAMAGE as error:
            raise self._damaged(error) from error
        self._archive: tarfile.TarFile | None = None

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.path} is not a whole gzip tar archive ({error}): delete it and fetch it again"
        )

    def names(self, folder: str = "") -> list[str]:
        """Sorted member names that start with `folder`."""
        return sorted(name for name in self._members if name.startswith(folder))

    def read(self, name: str) -> bytes:
        """The bytes of one member.

        Raises:
          ValueError: the archive has no such file, it is too large, or it is damaged.
        """
        member = self._members.get(name)
        if member is None:
            raise ValueError(f"{self.path} holds no package/{name}: is it the version asked for?")
        if member.size > _LARGEST_MEMBER:
            raise ValueError(f"{self.path}: package/{name} has {member.size} bytes, too large")
        try:
            if self._archive is None:
                self._archive = tarfile.open(self.path, "r:gz")
            stream = self._archive.extractfile(member)
            data = stream.read() if stream else b""
        except _DAMAGE as error:
            raise self._damaged(error) from error
        if len(data) != member.size:
            raise self._damaged(EOFError(f"package/{name} is cut short"))
        return data

    def json(self, name: str) -> Any:
        """One member, parsed as JSON.

        Raises:
          ValueError: see `read`; or the member is not JSON.
        """
        try:
            return json.loads(self.read(name))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: package/{name} is not JSON ({error})") from error
