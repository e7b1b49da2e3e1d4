"""Loads each export in its own consumer, diffusers on PyTorch, and compares what both draw.

What is exercised is what a user does: `from_pretrained`, `from_single_file` or `load_lora_weights`
(which hands the factors to PEFT), then
`pipe(prompt, timesteps=[...], guidance_scale=0, latents=..., generator=..., output_type="latent")`.
diffusers' `LCMScheduler` draws its fresh noise from that generator, in order, one draw a step;
nothing else draws from it, because the first latents are given. A second generator of the same
seed yields the same noises, which our sampler takes as an argument. So nothing is patched.

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

PROMPTS = ("a photo of a red apple", "a drawing of a blue bird")
STEPS = (2, 4, 8)
TOLERANCE = 1e-4


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

    Returns:
      For each product and step count, the relative difference.

    Raises:
      ValueError: a resolution that the teacher cannot have; nothing is deleted.
      VerificationError: products that failed, with the reason; they are deleted.
      ModuleNotFoundError: the consumer is not installed; nothing is deleted.
    """
    require_consumer()
    ours = _Ours(teacher, resolution)
    results: dict[str, dict[int, float]] = {}
    failures = []
    for target, path in products.items():
        try:
            results[target] = _compare(path, ours, prompts, steps, seed)
            worst = max(results[target].values())
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

    def __init__(self, teacher: str | Path, resolution: Resolution = None):
        self.teacher = load_model(teacher)
        self.resolution = resolution
        self.shape = self.teacher.latent_shape(resolution)
        self._draw: dict[int, Callable] = {}

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
        self, params: Any, prompts: Sequence[str], noise: np.ndarray, fresh: np.ndarray
    ) -> np.ndarray:
        """Latents `[b, h, w, c]` for the same noises, every product of matrices in full fp32."""
        model, steps = self.teacher, len(fresh) + 1

        def latents(params: Any, ids: Any, noise: jax.Array, fresh: jax.Array) -> jax.Array:
            text = model.encode_tokens(params, ids, self.resolution)
            denoiser = model.denoiser(params[model.backbone])
            times = student_timesteps(steps)
            return sample(denoiser, model.process, noise, text, times, noises=fresh)

        draw = self._draw.setdefault(steps, jax.jit(latents))
        with jax.default_matmul_precision("highest"):
            ids = model.tokenize(prompts)
            return np.asarray(draw(params, ids, jnp.asarray(noise), jnp.asarray(fresh)))


def _compare(
    path: Path, ours: _Ours, prompts: Sequence[str], steps: Sequence[int], seed: int
) -> dict[int, float]:
    """The relative difference of one product's latents, by step count."""
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
    differences = {}
    for count in steps:
        expected, fresh = draw_consumer(theirs, prompts, count, noise, seed + count, size)
        drawn = ours.draw(params, prompts, noise, fresh)
        differences[count] = float(np.linalg.norm(drawn - expected) / np.linalg.norm(expected))
    return differences


def draw_consumer(
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    noise: np.ndarray,
    seed: int,
    size: ImageSize | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws latents as a user of diffusers does.

    Args:
      pipe: a diffusers pipeline with an `LCMScheduler`.
      prompts: b texts.
      steps: 1 to 8.
      noise: `[b, h, w, c]`, the first latents.
      seed: of the generator.
      size: of the images, that the noise is for; the pipeline's own by default.

    Returns:
      Latents `[b, h, w, c]`, and the fresh noise `[steps - 1, b, h, w, c]` that went into them.
    """
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(noise, -1, 1)))
    latents = pipe(
        list(prompts),
        timesteps=list(student_timesteps(steps)),
        guidance_scale=0.0,
        latents=first,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **({} if size is None else {"height": size.height, "width": size.width}),
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
