"""Loads each export in its own consumer, diffusers on PyTorch, and compares what both draw.

What is exercised is what a user does: `from_pretrained`, `from_single_file` or `load_lora_weights`
(which hands the factors to PEFT), then
`pipe(prompt, timesteps=[...], guidance_scale=0, latents=..., generator=..., output_type="latent")`.
diffusers' `LCMScheduler` draws its fresh noise from that generator, in order, one draw a step;
nothing else draws from it, because the first latents are given. A second generator of the same
seed yields the same noises, which our sampler takes as an argument. So nothing is patched.

With a ControlNet given, each product draws a second time with it, in diffusers' ControlNet pipeline
on the same networks, from a random picture at scale 0.5.

Our side reads the weights back from the product itself, so that what rounding to fp16 changes is
on both sides; arithmetic is fp32.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from tlcm_jax.diffusion.sampling import sample
from tlcm_jax.diffusion.timesteps import student_timesteps
from tlcm_jax.families.load import load_model
from tlcm_jax.io import consumer, names
from tlcm_jax.io.consumer import product_kind
from tlcm_jax.io.image_size import ImageSize, Resolution
from tlcm_jax.io.lora_files import read_lora
from tlcm_jax.io.placement import to_devices
from tlcm_jax.io.products import product_folder
from tlcm_jax.io.tensors import open_component, weights_stem
from tlcm_jax.models import lora
from tlcm_jax.models.controlnet import ControlNetModel

PROMPTS = ("a photo of a red apple", "a drawing of a blue bird")
STEPS = (2, 4, 8)
TOLERANCE = 1e-4
CONTROL_SCALE = 0.5
# What a product's results with a ControlNet are called: its name, and this.
STEERED = " with the ControlNet"


class VerificationError(RuntimeError):
    """A product does not work in its consumer."""


def require_consumer() -> None:
    """Imports PyTorch, diffusers and PEFT, or says how to get them.

    Raises:
      ModuleNotFoundError: one of them is not installed.
    """
    try:
        import diffusers  # noqa: F401
        import peft  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "verifying an export needs torch, diffusers and peft, and they do not import "
            f"({str(error).splitlines()[0]}): pip install 'tlcm_jax[verify]', or leave out --verify"
        ) from None


def verify_products(
    products: Mapping[str, Path],
    teacher: str | Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    resolution: Resolution = None,
    control: str | Path | None = None,
) -> dict[str, dict[int, float]]:
    """Verifies every product, and deletes those that fail.

    Args:
      products: as `export_products` returned them.
      teacher: the teacher, as `load_model` reads it, which LoRAs and UNets are loaded onto.
      prompts: what is drawn.
      steps: numbers of steps.
      seed: of the noise.
      tolerance: largest relative difference of latents, |ours - theirs| / |theirs|.
      resolution: of the images; the teacher's own by default.
      control: a ControlNet's folder or hub id, with which each product draws too.

    Returns:
      For each product and step count, the relative difference; those with the ControlNet under the
      product's name and `STEERED`.

    Raises:
      ValueError: a resolution that the teacher cannot have; nothing is deleted.
      VerificationError: products that failed, with the reason; they are deleted.
      ModuleNotFoundError: the consumer is not installed; nothing is deleted.
    """
    require_consumer()
    ours = _Ours(teacher, resolution, control)
    results: dict[str, dict[int, float]] = {}
    failures = []
    for target, path in products.items():
        try:
            found = _compare(path, ours, prompts, steps, seed)
            results |= {target + suffix: differences for suffix, differences in found.items()}
            worst = max(max(differences.values()) for differences in found.values())
            if not worst <= tolerance:  # also when it is not a number
                raise VerificationError(
                    f"its latents differ from ours by {worst:.2g}, relative; allowed {tolerance:g}"
                )
        except Exception as error:  # whatever the consumer raises is this product's failure
            shutil.rmtree(product_folder(path))
            failures.append(f"{target} ({path}) failed and was deleted: {error}")
            logging.debug("verification of %s", target, exc_info=True)
        else:
            logging.info("%s verified: relative difference at most %.1e", target, worst)
    if failures:
        raise VerificationError("; ".join(failures))
    return results


class _Ours:
    """Our side: one compiled function a step count, for every product's weights."""

    def __init__(
        self,
        teacher: str | Path,
        resolution: Resolution = None,
        control: str | Path | None = None,
    ):
        self.teacher = load_model(teacher)
        self.resolution = resolution
        self.shape = self.teacher.latent_shape(resolution)
        self.control = None if control is None else self.teacher.load_control(control)
        if self.control is not None and self.control.folder is None:
            raise ValueError(f"--control {control}: diffusers wants a folder or hub id, no file")
        if self.control is not None and not isinstance(self.control.network, ControlNetModel):
            raise ValueError(f"--control {control}: products are verified with ControlNets alone")
        self._draw: dict[tuple[int, bool], Callable] = {}

    def weights(self, path: Path) -> tuple[dict[str, Any], set[str]]:
        """All networks' weights with the product in them, and the layers that a LoRA adapts."""
        teacher, kind = self.teacher, product_kind(path)
        name = teacher.backbone
        backbone = teacher.params[name]
        if kind == "lora":
            adapter = read_lora(path, backbone, teacher.lora_names)
            merged = lora.merge(backbone, adapter)
            return {**teacher.params, name: merged}, _layer_names(adapter)
        if kind == "backbone":
            tensors = open_component(path, weights_stem(teacher.configs[name]))
            views = names.match_tensors(tensors, backbone, str(path))
            return {**teacher.params, name: to_devices(views, backbone, tensors.release)}, set()
        product = load_model(path)
        if product.process != teacher.process:
            raise VerificationError("its scheduler has another noise schedule than the teacher's")
        return dict(product.params), set()

    def draw(
        self,
        params: Any,
        prompts: Sequence[str],
        noise: np.ndarray,
        fresh: np.ndarray,
        picture: np.ndarray | None = None,
    ) -> np.ndarray:
        """Latents `[b, h, w, c]` for the same noises, every product of matrices in full fp32.

        Args:
          params: all networks' weights.
          prompts: b texts.
          noise: the first latents.
          fresh: the noise between steps.
          picture: `[1, H, W, 3]` in 0 .. 1, which steers the ControlNet; None leaves that out.
        """
        model, steps, control = self.teacher, len(fresh) + 1, self.control

        def latents(params: Any, ids: Any, noise: jax.Array, fresh: jax.Array) -> jax.Array:
            text = model.encode_tokens(params, ids, self.resolution)
            controls = []
            if picture is not None and control is not None:
                image = jnp.broadcast_to(picture, (len(noise), *picture.shape[1:]))
                text = model.with_controls(text, [image], [CONTROL_SCALE])
                controls = [(control.network, control.params)]
            denoiser = model.denoiser(params[model.backbone], controls=controls)
            times = student_timesteps(steps)
            return sample(denoiser, model.process, noise, text, times, noises=fresh)

        draw = self._draw.setdefault((steps, picture is None), jax.jit(latents))
        with jax.default_matmul_precision("highest"):
            ids = model.tokenize(prompts)
            return np.asarray(draw(params, ids, jnp.asarray(noise), jnp.asarray(fresh)))


def _compare(
    path: Path, ours: _Ours, prompts: Sequence[str], steps: Sequence[int], seed: int
) -> dict[str, dict[int, float]]:
    """The relative difference of one product's latents by step count: under "", and `STEERED`."""
    params, layers = ours.weights(path)
    theirs = consumer.load(path, ours.teacher)
    loaded = consumer.adapted_layers(getattr(theirs, ours.teacher.backbone))
    if loaded != layers:
        wrong = ", ".join(sorted(loaded ^ layers)[:10])
        raise VerificationError(
            f"diffusers adapted {len(loaded & layers)} of its {len(layers)} layers; not {wrong}"
        )
    shape = (len(prompts), *ours.shape)
    size = ImageSize.read(ours.resolution) or ours.teacher.size
    noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
    found: dict[str, dict[int, float]] = {"": {}}
    pictures: dict[str, np.ndarray | None] = {"": None}
    if ours.control is not None and size is not None:
        pixels = np.random.default_rng(seed).integers(0, 256, (1, size.height, size.width, 3))
        pictures[STEERED] = pixels.astype(np.float32) / 255
    for suffix, picture in pictures.items():
        options: dict[str, Any] = {}
        if picture is not None and ours.control is not None:
            assert ours.control.folder is not None  # `_Ours`
            theirs = consumer.with_controlnet(theirs, ours.control.folder)
            options = {
                "image": torch_image(picture), "controlnet_conditioning_scale": CONTROL_SCALE,
            }  # fmt: skip
        for count in steps:
            at = prompts, count, noise, seed + count, size
            expected, fresh = draw_consumer(theirs, *at, **options)
            drawn = ours.draw(params, prompts, noise, fresh, picture)
            difference = np.linalg.norm(drawn - expected) / np.linalg.norm(expected)
            found.setdefault(suffix, {})[count] = float(difference)
    return found


def torch_image(picture: np.ndarray) -> Any:
    """A picture `[b, H, W, c]` as a tensor `[b, c, H, W]`."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(picture, -1, 1)))


def draw_consumer(
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    noise: np.ndarray,
    seed: int,
    size: ImageSize | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws latents as a user of diffusers does.

    Args:
      pipe: a diffusers pipeline with an `LCMScheduler`.
      prompts: b texts.
      steps: 1 to 8.
      noise: `[b, h, w, c]`, the first latents.
      seed: of the generator.
      size: of the images, that the noise is for; the pipeline's own by default.
      options: what the pipeline is given besides.

    Returns:
      Latents `[b, h, w, c]`, and the fresh noise `[steps - 1, b, h, w, c]` that went into them.
    """
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    first = torch_image(noise)
    latents = pipe(
        list(prompts),
        timesteps=list(student_timesteps(steps)),
        guidance_scale=0.0,
        latents=first,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **({} if size is None else {"height": size.height, "width": size.width}),
        **options,
    ).images
    again = torch.Generator().manual_seed(seed)
    fresh = [
        randn_tensor(first.shape, generator=again, dtype=first.dtype).numpy()
        for _ in range(steps - 1)
    ]
    return _nhwc(latents.numpy()), _nhwc(np.stack(fresh))


def _layer_names(adapter: Mapping[str, Any], path: tuple[str, ...] = ()) -> set[str]:
    if "lora_A" in adapter:
        return {".".join(path)}
    return {name for key, value in adapter.items() for name in _layer_names(value, (*path, key))}


def _nhwc(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -3, -1))
