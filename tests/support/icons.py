"""Tarballs of icons made here, as the emoji reader expects them."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from miniature import tarballs

SQUARE = '<path fill="#00f" d="M0 0h{0}v{0}H0z"/>'
# Two objects with every style, one with an FE0F, one with a tone variant, and two that must drop.
LABELS = [
    {"hexcode": "1F34E", "label": "red apple", "tags": ["fruit"], "group": 4},
    {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"], "group": 0},
    {"hexcode": "1F44B", "label": "waving hand", "group": 1, "skins": [{"hexcode": "1F44B-1F3FB"}]},
    {"hexcode": "1F44B-1F3FB", "label": "waving hand: light skin tone", "group": 1},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
    {"hexcode": "1F999", "label": "llama", "tags": [], "group": 3},
]


def write_tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def webp(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="WEBP", lossless=True, exact=True)
    return stream.getvalue()


def half_red():
    """Left half opaque red; right half fully transparent, of a colour that must not show."""
    pixels = np.zeros((256, 256, 4), np.uint8)
    pixels[:, :128] = (255, 0, 0, 255)
    pixels[:, 128:] = (0, 255, 0, 0)
    return webp(pixels)


def icon_set(names, size, **extra):
    icons = {name: {"body": SQUARE.format(size)} for name in names.values()} | extra
    return {
        "icons.json": json.dumps({"icons": icons, "width": size, "height": size}).encode(),
        "chars.json": json.dumps(names).encode(),
    }


def write_world(folder, labels=LABELS, noto=None):
    chinese = [entry | {"label": f"zh {entry['label']}"} for entry in labels]
    write_tarball(
        folder / tarballs.LABELS,
        {
            "en/data.json": json.dumps(labels).encode(),
            "zh/data.json": json.dumps(chinese).encode(),
        },
    )
    write_tarball(
        folder / tarballs.IMAGES["fluent-3d"],
        {
            f"assets/{code}.webp": half_red()
            for code in ("1f34e", "2764-fe0f", "1f44b", "1f44b-1f3fb", "1f1e6")
        },
    )
    names = {"1f34e": "red-apple", "2764": "red-heart", "1f44b": "waving-hand"}
    toned = names | {"1f44b-1f3fb": "waving-hand-light-skin-tone", "1fabc": "unlabelled"}
    write_tarball(folder / tarballs.IMAGES["noto"], noto or icon_set(toned, 128))
    write_tarball(folder / tarballs.IMAGES["fluent-flat"], icon_set(names, 32))
    write_tarball(
        folder / tarballs.IMAGES["twemoji"],
        icon_set({"1f34e": "red-apple", "2764-fe0f": "red-heart", "1f999": "llama"}, 36),
    )
    return folder
