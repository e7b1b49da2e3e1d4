"""Stable Diffusion 1.x, 2.x and SDXL: a UNet on an autoencoder's latents, told by CLIP's texts."""

import dataclasses
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num, PRNGKeyArray
from transformers import CLIPTokenizer

from tlcm_jax.data.tokens import clip_ids, read_tokenizer, tokenize
from tlcm_jax.diffusion.scheduler_config import process_from_config
from tlcm_jax.families.base import LatentModel, abstract_params
from tlcm_jax.families.controls import (
    ControlNetwork,
    control_maps,
    control_residuals,
    load_control,
)
from tlcm_jax.families.new_controls import new_control
from tlcm_jax.families.product import Params
from tlcm_jax.families.stable_diffusion_products import LORA_NAMES, PRODUCTS, TOWERS, VAE
from tlcm_jax.families.stable_diffusion_tools import WORKFLOW, settings_text, workflow
from tlcm_jax.families.text_adapter import ADAPTER, TOWER, AdaptedTexts, read_text_adapter
from tlcm_jax.io.image_size import ImageSize, Resolution
from tlcm_jax.io.json_files import parse, read_object
from tlcm_jax.io.ldm_names import UNET
from tlcm_jax.io.model_card import Recipe, model_card
from tlcm_jax.io.pipeline_index import INDEX_FILE, read_index
from tlcm_jax.io.schedule_marks import marks_of
from tlcm_jax.io.single_file import LdmFile
from tlcm_jax.io.sources import Source
from tlcm_jax.io.vae_files import VaeFiles
from tlcm_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from tlcm_jax.models.conditioning import Conditioning
from tlcm_jax.models.embeddings import guidance_embedding
from tlcm_jax.models.unet import UNet2DConditionModel, feature_widths
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.models.vae import AutoencoderKL, VAEConfig
from tlcm_jax.models.vae_tiling import decode_tiled

# The UNet's blocks, as its modules are named.
_BLOCK = re.compile(r"(down|up)_blocks\.\d+|mid_block")
TOKENIZERS = ("tokenizer", "tokenizer_2")
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_CLASSES = {
    UNET: ("UNet2DConditionModel",), VAE: ("AutoencoderKL",),
    TOWERS[0]: _TEXT_CLASSES, TOWERS[1]: _TEXT_CLASSES,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion(LatentModel):
    """Everything that a diffusers pipeline folder describes.

    `params` holds a tree for each of `unet`, `vae`, `text_encoder` (and `text_encoder_2`).

    Attributes:
      unet: the backbone.
      vae: the decoder, and encoder.
      text_encoders: one tower, or SDXL's two.
      zero_null: the null conditioning is zeros (SDXL) rather than the encoded empty prompt.
      text_adapter: another text encoder and its adapter, in the place of SDXL's own.
      embedded_guidance: the scale that a UNet with guidance embedding is given; others ignore it.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel, ...]
    zero_null: bool
    text_adapter: AdaptedTexts | None = None
    embedded_guidance: float = 8.0

    backbone = UNET
    decoder = VAE
    unused_by_features = ("up_blocks",)
    lora_names = LORA_NAMES
    products = PRODUCTS
    verified_by = "diffusers"

    @classmethod
    def open_file(cls, path: Path) -> LdmFile | None:
        """See `LatentModel`."""
        return LdmFile.open(path)

    @classmethod
    def from_configs(
        cls, source: Source, *, dtype: Any, param_dtype: Any, remat: str
    ) -> "StableDiffusion":
        """See `LatentModel`."""
        folder = source.folder
        index = read_index(folder)
        zeros = index.content.get("force_zeros_for_empty_prompt", True)
        if not isinstance(zeros, bool):
            raise ValueError(
                f"{folder / INDEX_FILE}: force_zeros_for_empty_prompt = {zeros!r}: must be true or "
                "false"
            )
        towers = TOWERS[: 1 + index.kind.startswith("StableDiffusionXL")]
        files = {name: source.config_file(name) for name in (UNET, VAE, *towers)}
        files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
        configs = {name: read_object(path) for name, path in files.items()}
        # The index says of which class a component is, whatever its own config says.
        kinds = {name: kind for name, (_, kind) in index.components.items() if name in configs}
        for name, kind in kinds.items():
            if name in _CLASSES and kind not in _CLASSES[name]:
                known = " or ".join(_CLASSES[name])
                raise ValueError(f"{folder}: {name} is of class {kind}, which is not {known}")
        for name in (UNET, VAE):
            configs[name] = {"_class_name": _CLASSES[name][0], **configs[name]}
        scheduler = kinds.get("scheduler", "").removeprefix("Flax")
        configs["scheduler"] = source.scheduler(
            {**configs["scheduler"], **({"_class_name": scheduler} if scheduler else {})}
        )
        process = parse(files["scheduler"], configs["scheduler"], process_from_config)
        described = dict(configs)
        for name in towers:
            if name in kinds:
                described[name] = {**configs[name], "architectures": [kinds[name]]}

        def network(name: str, kind: Any, config: Any, *options: Any) -> Any:
            return kind(parse(files[name], described[name], config.from_dict), dtype, *options)

        networks = {
            UNET: network(UNET, UNet2DConditionModel, UNetConfig, remat),
            VAE: network(VAE, AutoencoderKL, VAEConfig),
            **{name: network(name, CLIPTextModel, CLIPTextConfig) for name in towers},
        }
        params = {}
        for name, net in networks.items():
            try:
                params[name] = abstract_params(net, param_dtype)
            except Exception as error:  # whatever a shape that does not fit raises, and where
                reason = (str(error).split("\n") or [""])[0]
                raise ValueError(f"{files[name]} describes no network ({reason})") from None
        return cls(
            unet=networks[UNET],
            vae=networks[VAE],
            text_encoders=tuple(networks[name] for name in towers),
            process=process,
            params=params,
            configs=configs,
            zero_null=len(towers) > 1 and zeros,
            source=source.name,
            folder=str(folder),
        )

    @classmethod
    def open_decoder(cls, path: str | Path) -> VaeFiles:
        """See `LatentModel`."""
        return VaeFiles.open(path)

    def read_tokenizers(self, folder: Path) -> tuple[CLIPTokenizer, ...]:
        """See `LatentModel`."""
        return tuple(
            read_tokenizer(folder / name, tower.config.vocab_size)
            for name, tower in zip(TOKENIZERS, self.text_encoders, strict=False)
        )

    @property
    def static_key(self) -> Hashable:
        """See `LatentModel`."""
        return (
            self.unet, self.vae, self.text_encoders, self.process, self.zero_null,
            self.embedded_guidance, self.text_adapter,
        )  # fmt: skip

    def card(self, recipe: Recipe, product: str) -> str:
        """See `LatentModel`."""
        sdxl = len(self.text_encoders) == 2
        recipe = dataclasses.replace(recipe, sdxl=sdxl)
        tools = settings_text(recipe, product, self.process, self.configs[UNET])
        card = model_card(recipe, product, tools)
        marks, _ = marks_of(self.configs["scheduler"])
        if product != "single-file" or not marks:
            return card
        named = " and ".join(f"`{mark}`" for mark in marks)
        return card + (
            f"\n## Prediction\nThe UNet predicts v. The file says so by {named}, empty tensors "
            "that ComfyUI, Forge and A1111 look for; other tools may have to be told.\n"
        )

    def companions(self, recipe: Recipe, product: str) -> dict[str, str]:
        """See `LatentModel`: a workflow of ComfyUI."""
        text = workflow(recipe, product, self.process, recipe.size or self.size)
        return {} if text is None else {WORKFLOW: text}

    def check_teacher(self) -> None:
        """See `LatentModel`."""
        if self.guidance_is_embedded:
            raise ValueError(
                f"{self.source}: this UNet takes the guidance scale as an input "
                "(time_cond_proj_dim): it is a distilled model already; take the model that it "
                "was distilled from as teacher"
            )
        if self.needs_mask:
            raise ValueError(
                f"{self.source}: this UNet is an inpainting model's, and states of it need "
                "pictures and masks: distil its text-to-image model, and put the student's LoRA "
                "onto this one (sample --lora)"
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
        names = TOWERS if self.text_adapter is None else (TOWER, ADAPTER)
        return {name: tree for name, tree in self.params.items() if name in names}

    def with_text_adapter(self, path: str | Path) -> "StableDiffusion":
        """See `LatentModel`; the folder is `families.text_adapter`'s."""
        return self._with_texts(path, None)

    def with_new_text_adapter(
        self, path: str | Path, key: PRNGKeyArray, hidden_width: int = 2048
    ) -> "StableDiffusion":
        """See `LatentModel`."""
        return self._with_texts(path, key, hidden_width)

    def _with_texts(
        self, path: str | Path, key: PRNGKeyArray | None, hidden_width: int = 2048
    ) -> "StableDiffusion":
        config = self.unet.config
        if len(self.text_encoders) < 2 or not config.text_time:
            raise ValueError(
                f"{self.source} is not SDXL, whose pooled and sequence states a text adapter gives"
            )
        ids = 6 * config.addition_time_embed_dim
        texts, params, tokenizer = read_text_adapter(
            path,
            dtype=self.dtype,
            pooled_width=config.projection_class_embeddings_input_dim - ids,
            sequence_width=config.cross_attention_dim,
            key=key,
            hidden_width=hidden_width,
        )
        return dataclasses.replace(
            self,
            text_adapter=texts,
            params={**self.params, **params},
            tokenizers=(tokenizer,),
            zero_null=False,
        )

    @property
    def size(self) -> ImageSize:
        """See `LatentModel`."""
        latents, factor = self.unet.config.sample_size, self.vae.config.downsampling
        height, width = (latents, latents) if isinstance(latents, int) else latents
        return ImageSize(height=factor * height, width=factor * width)

    def latent_shape(self, resolution: Resolution = None) -> tuple[int, int, int]:
        """Height, width and channels of the latents of an image.

        Raises:
          ValueError: the resolution is not a multiple of the autoencoder's factor.
        """
        factor = self.vae.config.downsampling
        size = ImageSize.read(resolution) or self.size
        size.check(factor)
        return (size.height // factor, size.width // factor, self.vae.config.latent_channels)

    def image_size(self, resolution: Resolution = None) -> tuple[int, int]:
        """See `LatentModel`."""
        height, width, _ = self.latent_shape(resolution)
        return height * self.vae.config.downsampling, width * self.vae.config.downsampling

    @property
    def needs_mask(self) -> bool:
        """See `LatentModel`: a UNet for inpainting has channels for both."""
        channels = self.vae.config.latent_channels
        return self.unet.config.in_channels == 2 * channels + 1

    def with_mask(
        self,
        conditioning: Conditioning,
        mask: Float[Array, "b h w 1"],
        left: Float[Array, "b h w c"],
    ) -> Conditioning:
        """See `LatentModel`."""
        return dataclasses.replace(conditioning, masked=jnp.concatenate([mask, left], axis=-1))

    @property
    def guidance_is_embedded(self) -> bool:
        """See `LatentModel`: LCM's UNets do."""
        return self.unet.config.time_cond_proj_dim is not None

    def with_embedded_guidance(self, scale: float) -> LatentModel:
        """See `LatentModel`."""
        if not self.guidance_is_embedded:
            return super().with_embedded_guidance(scale)
        return dataclasses.replace(self, embedded_guidance=scale)

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
        if self.text_adapter is not None:
            if prompts_2 is not None or chunks != 1:
                raise ValueError("a text adapter has one encoder, which reads one chunk of a text")
            return (clip_ids(self.tokenizers[0], prompts, self.text_adapter.length),)
        return tokenize(self.tokenizers, prompts, prompts_2, chunks=chunks)

    def encode_tokens(
        self, params: Params, ids: Sequence[ArrayLike], resolution: Resolution = None
    ) -> Conditioning:
        """Conditioning of tokenized prompts; traceable.

        SDXL concatenates both towers' penultimate states and adds the second's pooled output and
        the size conditioning (original size, no crop, target size). SD 1.x and 2.x take the last
        state after the final norm.

        Args:
          params: as `self.params` (an argument, so that jitted callers can shard it).
          ids: what `tokenize` returns.
          resolution: of the images; the model's own by default.
        """
        outputs: list[Any] = (
            []
            if self.text_adapter
            else [
                tower.apply({"params": params[name]}, jnp.asarray(tokens))
                for tower, name, tokens in zip(self.text_encoders, TOWERS, ids, strict=False)
            ]
        )
        batch, scale = jnp.shape(ids[0])[0], None
        if self.guidance_is_embedded:
            scale = jnp.full(batch, self.embedded_guidance, jnp.float32)
        if len(outputs) == 1:
            return Conditioning(prompt_embeds=outputs[0][1], guidance_scale=scale)
        size = ImageSize.read(resolution) or self.size
        sides = (size.height, size.width)
        time_ids = jnp.array([[*sides, 0, 0, *sides]], jnp.float32)
        if self.text_adapter is not None:
            sequence, pooled = self.text_adapter.encode(params, ids[0])
        else:
            sequence = jnp.concatenate([states[-2] for states, _, _ in outputs], axis=-1)
            pooled = outputs[1][2]
        return Conditioning(
            prompt_embeds=sequence,
            pooled=pooled,
            time_ids=jnp.broadcast_to(time_ids, (batch, 6)),
            guidance_scale=scale,
        )

    def null_conditioning(
        self, resolution: Resolution = None, like: Sequence[Any] | None = None
    ) -> Conditioning:
        """See `LatentModel`: zeros (SDXL) or the empty prompt."""
        chunks = 1 if like is None or like[0].ndim == 2 else like[0].shape[1]
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
        params: Params,
        z: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        conditioning: Conditioning,
        lora: Params | None = None,
        features: bool = False,
        controls: Sequence[Any] = (),
    ) -> Any:
        """See `LatentModel`."""
        residuals = control_residuals(controls, z, t, conditioning)
        variables = {"params": params} if lora is None else {"params": params, "lora": lora}
        if conditioning.masked is not None:
            z = jnp.concatenate([z, conditioning.masked], axis=-1)
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
            residuals=residuals,
            features=features,
        )

    def load_control(self, path: str | Path) -> ControlNetwork:
        """See `LatentModel`: a ControlNet or a T2I-Adapter."""
        dtype = jax.tree.leaves(self.params[UNET])[0].dtype
        factor = self.vae.config.downsampling
        return load_control(path, self.unet, self.configs[UNET], factor, dtype)

    def new_control(
        self, kind: str, key: PRNGKeyArray, *, channels: int = 3, widths: Sequence[int] = ()
    ) -> tuple[ControlNetwork, dict[str, Any]]:
        """See `LatentModel`."""
        return new_control(
            kind, self.unet, self.configs[UNET], self.params[UNET], self.vae.config.downsampling,
            key, channels=channels, widths=widths,
        )  # fmt: skip

    def with_controls(
        self,
        conditioning: Conditioning,
        images: Sequence[Float[Array, "b h w c"]],
        scales: Sequence[float],
    ) -> Conditioning:
        """See `LatentModel`."""
        return dataclasses.replace(conditioning, controls=control_maps(images, scales))

    def predict_states(
        self,
        params: Params,
        z: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "b h w c"], dict[str, Float[Array, "b _ _ _"]]]:
        """The raw prediction, and the states after each block down, middle and up, by its name."""

        def is_block(module: Any, method: str) -> bool:
            return method == "__call__" and bool(_BLOCK.fullmatch(module.name or ""))

        prediction, captured = self.unet.apply(
            {"params": params}, z, t, conditioning.prompt_embeds, conditioning.pooled,
            conditioning.time_ids, capture_intermediates=is_block, mutable=["intermediates"],
        )  # fmt: skip
        states = {}
        for name, calls in captured["intermediates"].items():
            (out,) = calls["__call__"]
            states[name] = out[0] if isinstance(out, tuple) else out
        return prediction, states

    def encode_english(self, params: Params, ids: Sequence[ArrayLike]) -> Conditioning:
        """As `encode_tokens`, by the model's own encoders, whether or not it has an adapter."""
        return dataclasses.replace(self, text_adapter=None).encode_tokens(params, ids)

    @property
    def feature_widths(self) -> dict[str, int]:
        """See `LatentModel`."""
        return feature_widths(self.unet.config)

    def decode_latents(
        self, params: Params, latents: Float[Array, "b h w c"], tile: int = 0
    ) -> Float[Array, "b H W 3"]:
        """See `LatentModel`: the tiles are `models.vae_tiling`'s, the same image, slower."""
        unscaled = latents / self.vae.config.scaling_factor
        images: Any
        if tile:
            images = decode_tiled(self.vae, params[VAE], unscaled, tile)
        else:
            variables = {"params": params[VAE]}
            images = self.vae.apply(variables, unscaled, method=self.vae.decode)
        return jnp.clip(images / 2 + 0.5, 0.0, 1.0)

    def encode_images(
        self, images: Float[Array, "b H W 3"], params: Params | None = None
    ) -> Float[Array, "b h w c"]:
        """See `LatentModel`: scaled latents, the posterior's mean."""
        variables = {"params": (self.params if params is None else params)[VAE]}
        moments: Any = self.vae.apply(variables, 2 * images - 1, method=self.vae.encode)
        return moments[0] * self.vae.config.scaling_factor
