"""Maps of scenes, and examples with them for control networks' training.

An outline is white on black where the objects' silhouettes end, a layout grey silhouettes: both say
where an object is, of which shape and how large, and nothing of its colour.

    python -m tlcm_jax.train_control --images miniature.shapes.maps:outlines ...
"""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from miniature.shapes.captions import WORDINGS, english
from miniature.shapes.render import mask, render
from miniature.shapes.scene import RUNGS, SIDE, TEST_START, Scene, draw_scene, draw_spec
from tlcm_jax import paths
from tlcm_jax.data.control_pictures import Examples
from tlcm_jax.families.load import load_model

_RUNG = "r1"
_VALUES = 8 * 8 * 3


def silhouettes(scene: Scene) -> Float[np.ndarray, "64 64"]:
    """The share of each pixel that objects cover."""
    whole = np.zeros((SIDE, SIDE))
    for thing in scene.things:
        box, share = mask(thing.shape, thing.x, thing.y, thing.radius, thing.rotation)
        whole[box] = np.maximum(whole[box], share)
    return whole


def layout(scene: Scene) -> UInt8[np.ndarray, "64 64 1"]:
    """The silhouettes, in grey."""
    return np.round(255 * silhouettes(scene)).astype(np.uint8)[..., None]


def outline(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """The silhouettes' edges, in three equal channels, which ControlNets' pipelines read."""
    inside = silhouettes(scene)
    edge = ndimage.grey_dilation(inside, (3, 3)) - ndimage.grey_erosion(inside, (3, 3)) > 0.5
    return np.where(edge, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)


@functools.cache
def affine_encoder() -> tuple[Float[np.ndarray, "192 24"], Float[np.ndarray, " 24"]]:
    """The linear codec that shapes-xl's encoder is, read off its answers to blocks of 8 x 8 pixels.

    Returns:
      Matrix and offset, of a block's pixels in 0 .. 1 to its scaled latents.
    """
    model = load_model(paths.MINIATURE / "shapes-xl")
    blocks = np.concatenate([np.zeros((64, _VALUES)), np.eye(_VALUES)]).astype(np.float32)
    images = (
        blocks.reshape(-1, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIDE, SIDE, 3)
    )
    answers = np.asarray(jax.jit(model.encode_images)(images)).reshape(-1, 24)
    offset = answers[:64].mean(0)
    return answers[64:] - offset, offset


def encode(images: UInt8[np.ndarray, "b 64 64 3"]) -> Float[np.ndarray, "b 8 8 24"]:
    """Scaled latents, as shapes-xl's encoder makes them to 1e-3, at no cost."""
    matrix, offset = affine_encoder()
    blocks = images.reshape(-1, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(-1, 8, 8, _VALUES).astype(np.float32) / 255 @ matrix + offset


def examples(map_of: Callable[[Scene], np.ndarray], size: int, seed: int) -> Iterator[Examples]:
    """Endless batches of training scenes (integers below `TEST_START`), rendered as they come."""
    rung, rng = RUNGS[_RUNG], np.random.default_rng(seed)
    while True:
        images, maps, texts = [], [], []
        for index in rng.integers(TEST_START, size=size):
            spec = draw_spec(int(index), rung)
            scene = draw_scene(spec, int(index), rung)
            images.append(render(scene))
            maps.append(map_of(scene))
            texts.append(english(spec, int(rng.integers(WORDINGS))))
        yield Examples(latents=encode(np.stack(images)), maps=np.stack(maps), texts=texts)


def outlines(size: int, seed: int) -> Iterator[Examples]:
    """`examples` with outlines."""
    return examples(outline, size, seed)


def layouts(size: int, seed: int) -> Iterator[Examples]:
    """`examples` with layouts."""
    return examples(layout, size, seed)
