"""A text-to-image pipeline: networks, weights, tokenizers and process, as pure functions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from transformers import PreTrainedTokenizerBase

from tlcm_jax.data.tokens import tokenize
from tlcm_jax.diffusion.process import Process
from tlcm_jax.families.base import LatentModel
from tlcm_jax.models.clip_text import CLIPTextModel
from tlcm_jax.models.conditioning import Conditioning
from tlcm_jax.models.embeddings import guidance_embedding
from tlcm_jax.models.unet import UNet2DConditionModel, feature_widths
from tlcm_jax.models.vae import AutoencoderKL
from tlcm_jax.models.vae_tiling import decode_tiled


@dataclasses.dataclass(frozen=True)
class StableDiffusion(LatentModel):
    """Everything that a diffusers pipeline folder describes.

    Attributes:
      params: a tree for each of `unet`, `vae`, `text_encoder` (and `text_encoder_2`).
      text_encoders: one tower, or SDXL's two.
      tokenizers: as many.
      configs: each component's own JSON, as on disk; exports write it back.
      zero_null: the null conditioning is zeros (SDXL) rather than the encoded empty prompt.
      embedded_guidance: the scale that a UNet with guidance embedding is given; others ignore it.
      source: where the weights came from: what `load_model` was given.
      folder: the local folder, in diffusers' layout, with the configs and tokenizers.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel, ...]
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    process: Process
    params: Mapping[str, Any]
    configs: Mapping[str, Any]
    zero_null: bool
    source: str
    folder: str
    embedded_guidance: float = 8.0

    backbone = "unet"
    decoder = "vae"
    unused_by_features = ("up_blocks",)

    def check_teacher(self) -> None:
        """See `LatentModel`."""
        if self.guidance_is_embedded:
            raise ValueError(
                f"{self.source}: this UNet takes the guidance scale as an input "
                "(time_cond_proj_dim): it is a distilled model already; take the model that it "
                "was distilled from as teacher"
            )

    @property
    def dtype(self) -> Any:
        """See `LatentModel`."""
        return self.unet.dtype

    @property
    def norm_groups(self) -> int:
        """See `LatentModel`."""
        return self.unet.config.norm_num_groups

    @property
    def text_params(self) -> dict[str, Any]:
        """See `LatentModel`."""
        return {name: tree for name, tree in self.params.items() if name.startswith("text_encoder")}

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

    @property
    def guidance_is_embedded(self) -> bool:
        """The UNet takes the guidance scale as an input (LCM), and needs no second evaluation."""
        return self.unet.config.time_cond_proj_dim is not None

    def tokenize(
        self,
        prompts: Sequence[str],
        prompts_2: Sequence[str] | None = None,
        chunks: int | None = 1,
    ) -> tuple[np.ndarray, ...]:
        """Token ids for each text encoder, `[b, 77]`, or `[b, chunks, 77]`: `data.tokens`.

        Args:
          prompts: b texts, which one chunk cuts at their 77th token.
          prompts_2: the second text encoder's, where they differ.
          chunks: of 75 tokens a prompt may have; None for as many as the longest needs.

        Raises:
          ValueError: `prompts_2` that do not fit the model or the prompts.
        """
        return tokenize(self.tokenizers, prompts, prompts_2, chunks=chunks)

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
        batch, scale = len(ids[0]), None
        if self.guidance_is_embedded:
            scale = jnp.full(batch, self.embedded_guidance, jnp.float32)
        if len(outputs) == 1:
            return Conditioning(prompt_embeds=outputs[0][1], guidance_scale=scale)
        side = resolution or self.resolution
        time_ids = jnp.array([[side, side, 0, 0, side, side]], jnp.float32)
        return Conditioning(
            prompt_embeds=jnp.concatenate([states[-2] for states, _, _ in outputs], axis=-1),
            pooled=outputs[1][2],
            time_ids=jnp.broadcast_to(time_ids, (batch, 6)),
            guidance_scale=scale,
        )

    @functools.cached_property
    def _jitted_encode(self) -> Callable:
        return jax.jit(self.encode_tokens, static_argnames="resolution")

    @functools.cached_property
    def _jitted_decode(self) -> Callable:
        return jax.jit(self.decode_latents, static_argnames="tile")

    def encode(
        self,
        prompts: Sequence[str],
        resolution: int | None = None,
        *,
        prompts_2: Sequence[str] | None = None,
        chunks: int | None = 1,
    ) -> Conditioning:
        """Conditioning of `prompts`, leading axis `len(prompts)`; arguments as `tokenize`'s."""
        ids = self.tokenize(prompts, prompts_2, chunks)
        return self._jitted_encode(self.params, ids, resolution=resolution)

    def null_conditioning(self, resolution: int | None = None, chunks: int = 1) -> Conditioning:
        """What guidance moves away from, leading axis 1: zeros (SDXL) or the empty prompt.

        It needs as many `chunks` as the conditioning that it stands beside.
        """
        empty = self.encode([""], resolution, chunks=chunks)
        if not self.zero_null:
            return empty
        return dataclasses.replace(
            empty,
            prompt_embeds=jnp.zeros_like(empty.prompt_embeds),
            pooled=None if empty.pooled is None else jnp.zeros_like(empty.pooled),
        )

    def null_of(self, null: Conditioning, conditioning: Conditioning) -> Conditioning:
        """See `LatentModel`: the texts of `null`, and all else of `conditioning`."""
        return dataclasses.replace(
            conditioning, prompt_embeds=null.prompt_embeds, pooled=null.pooled
        )

    def predict(
        self,
        params: Mapping[str, Any],
        z: Array,
        t: Array,
        conditioning: Conditioning,
        lora: Mapping[str, Any] | None = None,
        features: bool = False,
    ) -> Any:
        """See `LatentModel`."""
        variables = {"params": params} if lora is None else {"params": params, "lora": lora}
        width, condition = self.unet.config.time_cond_proj_dim, None
        if width is not None and conditioning.guidance_scale is not None:
            condition = guidance_embedding(conditioning.guidance_scale, width)
        return self.unet.apply(
            variables,
            z,
            t,
            conditioning.prompt_embeds,
            conditioning.pooled,
            conditioning.time_ids,
            condition,
            features=features,
        )

    @property
    def feature_widths(self) -> dict[str, int]:
        """See `LatentModel`."""
        return feature_widths(self.unet.config)

    def decode_latents(self, params: Mapping[str, Any], latents: Array, tile: int = 0) -> Array:
        """Pictures `[b, h, w, 3]` in 0..1 from scaled latents; traceable.

        Args:
          params: as `self.params`.
          latents: `[b, h/f, w/f, c]`.
          tile: side of the tiles, in latent pixels, that large pictures are decoded by
            (`models.vae_tiling`: less memory, the same picture, slower); 0 decodes at once.
        """
        unscaled = latents / self.vae.config.scaling_factor
        images: Any
        if tile:
            images = decode_tiled(self.vae, params["vae"], unscaled, tile)
        else:
            variables = {"params": params["vae"]}
            images = self.vae.apply(variables, unscaled, method=self.vae.decode)
        return jnp.clip(images / 2 + 0.5, 0.0, 1.0)

    def decode(self, latents: Array, tile: int = 0) -> Array:
        """Pictures `[b, h, w, 3]` in 0..1 from scaled latents: `decode_latents`, compiled."""
        return self._jitted_decode(self.params, latents, tile=tile)

    def encode_images(self, images: Array) -> Array:
        """Scaled latents (the posterior's mean) of pictures `[b, h, w, 3]` in 0..1."""
        variables = {"params": self.params["vae"]}
        moments: Any = self.vae.apply(variables, 2 * images - 1, method=self.vae.encode)
        return moments[0] * self.vae.config.scaling_factor
