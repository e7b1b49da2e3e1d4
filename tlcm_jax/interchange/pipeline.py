"""A text-to-image pipeline: networks, weights, tokenizers and schedule, as pure functions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from transformers import PreTrainedTokenizerBase

from tlcm_jax.diffusion.prediction import Denoiser, epsilon_denoiser
from tlcm_jax.diffusion.schedule import NoiseSchedule
from tlcm_jax.models.clip_text import CLIPTextModel
from tlcm_jax.models.conditioning import Conditioning
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.vae import AutoencoderKL


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Everything that a diffusers pipeline folder describes.

    Attributes:
      params: a tree for each of `unet`, `vae`, `text_encoder` (and `text_encoder_2`).
      text_encoders: one tower, or SDXL's two.
      tokenizers: as many.
      configs: each component's own JSON, as on disk; exports write it back.
      zero_null: the null conditioning is zeros (SDXL) rather than the encoded empty prompt.
      source: where the weights came from: what `load_pipeline` was given.
      folder: the local folder, in diffusers' layout, with the configs and tokenizers.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel, ...]
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    schedule: NoiseSchedule
    params: Mapping[str, Any]
    configs: Mapping[str, Any]
    zero_null: bool
    source: str
    folder: str

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the square pictures that the UNet was trained on."""
        return self.unet.config.sample_size * self.vae.config.downsampling

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """Height, width and channels of the latents of a square picture.

        Raises:
          ValueError: the resolution is not a multiple of the autoencoder's factor.
        """
        factor = self.vae.config.downsampling
        resolution = resolution or self.resolution
        if resolution % factor:
            raise ValueError(f"resolution {resolution} must be a multiple of {factor}")
        return (resolution // factor, resolution // factor, self.vae.config.latent_channels)

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Token ids `[b, 77]` for each text encoder, truncated and padded as the folder says."""
        return tuple(
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="np",
            )["input_ids"].astype(np.int32)
            for tokenizer in self.tokenizers
        )

    def encode_tokens(
        self, params: Mapping[str, Any], ids: Sequence[Array], resolution: int | None = None
    ) -> Conditioning:
        """Conditioning of tokenized prompts; traceable.

        SDXL concatenates both towers' penultimate states and adds the second's pooled output and
        the size conditioning (original size, no crop, target size). SD 1.x and 2.x take the last
        state after the final norm.

        Args:
          params: as `self.params` (an argument, so that jitted callers can shard it).
          ids: what `tokenize` returns.
          resolution: side of the pictures in pixels; the model's own by default.
        """
        outputs: list[Any] = [
            tower.apply({"params": params[name]}, tokens)
            for tower, name, tokens in zip(
                self.text_encoders, ("text_encoder", "text_encoder_2"), ids, strict=False
            )
        ]
        if len(outputs) == 1:
            return Conditioning(prompt_embeds=outputs[0][1])
        side = resolution or self.resolution
        time_ids = jnp.array([[side, side, 0, 0, side, side]], jnp.float32)
        return Conditioning(
            prompt_embeds=jnp.concatenate([states[-2] for states, _, _ in outputs], axis=-1),
            pooled=outputs[1][2],
            time_ids=jnp.broadcast_to(time_ids, (ids[0].shape[0], 6)),
        )

    @functools.cached_property
    def _jitted_encode(self) -> Callable:
        return jax.jit(self.encode_tokens, static_argnames="resolution")

    @functools.cached_property
    def _jitted_decode(self) -> Callable:
        return jax.jit(self.decode_latents)

    def encode(self, prompts: Sequence[str], resolution: int | None = None) -> Conditioning:
        """Conditioning of `prompts`, leading axis `len(prompts)`."""
        return self._jitted_encode(self.params, self.tokenize(prompts), resolution=resolution)

    def null_conditioning(self, resolution: int | None = None) -> Conditioning:
        """What guidance moves away from, leading axis 1: zeros (SDXL) or the empty prompt."""
        empty = self.encode([""], resolution)
        if not self.zero_null:
            return empty
        return dataclasses.replace(
            empty,
            prompt_embeds=jnp.zeros_like(empty.prompt_embeds),
            pooled=None if empty.pooled is None else jnp.zeros_like(empty.pooled),
        )

    def denoiser(
        self, params: Mapping[str, Any] | None = None, lora: Mapping[str, Any] | None = None
    ) -> Denoiser:
        """The UNet as `(z, t, conditioning) -> eps`, with other weights or an adapter if given.

        Args:
          params: the UNet's tree; the pipeline's own by default.
          lora: an adapter already scaled (`models.lora.scaled`).
        """
        variables = {"params": self.params["unet"] if params is None else params}
        if lora is not None:
            variables["lora"] = lora

        def network(z: Array, t: Array, conditioning: Conditioning) -> Any:
            return self.unet.apply(
                variables,
                z,
                t,
                conditioning.prompt_embeds,
                conditioning.pooled,
                conditioning.time_ids,
            )

        return epsilon_denoiser(self.schedule, network)

    def features(
        self, params: Mapping[str, Any], lora: Mapping[str, Any] | None = None
    ) -> Callable[[Array, Array, Conditioning], Mapping[str, Array]]:
        """The UNet's states up to its middle, `(z, t, conditioning) -> {block: [b, h', w', c']}`.

        Args:
          params: the UNet's tree.
          lora: an adapter already scaled.
        """
        variables = {"params": params} | ({} if lora is None else {"lora": lora})

        def network(z: Array, t: Array, conditioning: Conditioning) -> Any:
            return self.unet.apply(
                variables,
                z,
                t,
                conditioning.prompt_embeds,
                conditioning.pooled,
                conditioning.time_ids,
                features=True,
            )

        return network

    def decode_latents(self, params: Mapping[str, Any], latents: Array) -> Array:
        """Pictures `[b, h, w, 3]` in 0..1 from scaled latents; traceable."""
        unscaled = latents / self.vae.config.scaling_factor
        variables = {"params": params["vae"]}
        images: Any = self.vae.apply(variables, unscaled, method=self.vae.decode)
        return jnp.clip(images / 2 + 0.5, 0.0, 1.0)

    def decode(self, latents: Array) -> Array:
        """Pictures `[b, h, w, 3]` in 0..1 from scaled latents `[b, h/f, w/f, c]`."""
        return self._jitted_decode(self.params, latents)

    def encode_images(self, images: Array) -> Array:
        """Scaled latents (the posterior's mean) of pictures `[b, h, w, 3]` in 0..1."""
        variables = {"params": self.params["vae"]}
        moments: Any = self.vae.apply(variables, 2 * images - 1, method=self.vae.encode)
        return moments[0] * self.vae.config.scaling_factor
