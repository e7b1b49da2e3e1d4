"""What a model family is: everything that distillation, sampling and export ask of a model.

A family is its networks (in `models/`), one file beside this one, and one line in the table of
`load.py`. The engine never names a component of its own: the trained network is
`params[backbone]`, whatever the family calls it.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.guidance import Denoiser
from tlcm_jax.diffusion.process import Process
from tlcm_jax.families.product import Params, Product
from tlcm_jax.io.image_size import ImageSize, Resolution
from tlcm_jax.io.lora_names import LoraNames
from tlcm_jax.io.sources import ComponentFiles, SingleFile, Source
from tlcm_jax.io.tensors import Tensors
from tlcm_jax.models.lora import TARGETS


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentModel:
    """A text-conditioned generator of latents: pure functions of its parameters.

    Attributes:
      process: how its data becomes noise, and what its network predicts.
      params: a tree for each component.
      configs: each component's own JSON, as on disk; exports write it back.
      source: where the weights came from: what `load_model` was given.
      decoder_source: where the decoder came from, if not from there.
      folder: the local folder with the configs and tokenizers.
      tokenizers: of its text encoders, where they are `transformers`' own.
      backbone: the component that is trained and adapted.
      decoder: the component that `decode_latents` reads.
      lora_targets: endings of the names of the layers that an adapter changes by default.
      unused_by_features: beginnings of the names of the backbone's layers that the states of
        `predict(features=True)` do not depend on.
      lora_names: how LoRA files name its layers.
      products: what its students are handed out as, by name.
      verified_by: the library that products are verified in; None where there is none.
    """

    process: Process
    params: Params
    configs: Mapping[str, Any]
    source: str
    folder: str
    tokenizers: tuple[Any, ...] = ()
    decoder_source: str | None = None
    backbone: ClassVar[str]
    decoder: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]] = TARGETS
    unused_by_features: ClassVar[tuple[str, ...]] = ()
    lora_names: ClassVar[LoraNames]
    products: ClassVar[Mapping[str, Product]] = {}
    verified_by: ClassVar[str | None] = None

    # Files.

    @classmethod
    def open_file(cls, path: Path) -> SingleFile | None:
        """A single-file checkpoint of this family; None where the file is of no layout of its.

        Raises:
          ValueError: the file is broken, or of the family but of no use.
        """
        return None

    @classmethod
    def open_decoder(cls, path: str | Path) -> ComponentFiles:
        """A decoder that lies elsewhere than its model.

        Raises:
          FileNotFoundError, ValueError: there is none there, or none of this family.
        """
        raise ValueError(f"--vae {path}: the decoder of this family lies with its model")

    @classmethod
    def from_configs(
        cls, source: Source, *, dtype: Any, param_dtype: Any, remat: str
    ) -> "LatentModel":
        """The model that `source.folder`'s configs describe: shapes for weights.

        Args:
          source: where it lies.
          dtype: compute dtype of every network.
          param_dtype: dtype of the weights.
          remat: the backbone's rematerialisation policy.

        Raises:
          FileNotFoundError, ValueError: a config is missing or asks for what there is not.
        """
        raise NotImplementedError

    def open_component(self, source: Source, name: str) -> Tensors:
        """A component's tensors by the names of its tree; by default diffusers' folder layout."""
        return source.component(name, self.params[name], self.configs[name])

    def read_tokenizers(self, folder: Path) -> tuple[Any, ...]:
        """The tokenizers that lie in a folder, read as data."""
        return ()

    # Identity.

    @property
    def dtype(self) -> Any:
        """The networks' compute dtype."""
        raise NotImplementedError

    @property
    def static_key(self) -> Hashable:
        """All that the model's functions depend on besides their arguments.

        Models of equal keys share compiled code, such as one teacher with several adapters.
        """
        raise NotImplementedError

    def without_weights(self) -> "LatentModel":
        """The model's functions alone, which keep no weights alive."""
        return replace(self, params={}, tokenizers=())

    def with_params(self, **components: Params) -> "LatentModel":
        """The model with other weights of some components, by name."""
        return replace(self, params={**self.params, **components})

    def card(self, recipe: Any, product: str) -> str:
        """The text of a product's `README.md`.

        Args:
          recipe: how the student was made, an `io.model_card.Recipe`.
          product: a key of `products`.
        """
        raise NotImplementedError

    def companions(self, recipe: Any, product: str) -> dict[str, str]:
        """Texts that lie beside a product, by file name; arguments as `card`'s."""
        return {}

    def check_teacher(self) -> None:
        """Raises a ValueError, which says why, if the model cannot be distilled."""

    # Texts.

    @property
    def text_params(self) -> dict[str, Any]:
        """The part of `params` that `encode_tokens` reads."""
        raise NotImplementedError

    def tokenize(
        self,
        prompts: Sequence[str],
        prompts_2: Sequence[str] | None = None,
        chunks: int | None = 1,
    ) -> tuple[Any, ...]:
        """Token ids on the host, one array for each text encoder, `[n, ...]` each.

        Args:
          prompts: n texts.
          prompts_2: the second text encoder's, where they differ.
          chunks: pieces, of what the encoders read at once, that a text may have; None for as
            many as the longest needs.

        Raises:
          ValueError: `prompts_2` or `chunks` that the model has no use for.
        """
        raise NotImplementedError

    def encode_tokens(
        self, params: Params, ids: Sequence[ArrayLike], resolution: Resolution = None
    ) -> PyTree[Array]:
        """Conditioning of tokenized prompts, leading axis n; traceable.

        Args:
          params: at least `text_params`.
          ids: what `tokenize` returns.
          resolution: of the images that are to be generated: height and width, text such as
            `1216x832` (width first), or the side of a square; the model's own by default.
        """
        raise NotImplementedError

    def encode(
        self,
        prompts: Sequence[str],
        resolution: Resolution = None,
        *,
        prompts_2: Sequence[str] | None = None,
        chunks: int | None = 1,
    ) -> PyTree[Array]:
        """Conditioning of `prompts`, leading axis `len(prompts)`; arguments as `tokenize`'s."""
        ids = self.tokenize(prompts, prompts_2, chunks)
        return self._jitted_encode(self.params, ids, resolution=resolution)

    def null_conditioning(
        self, resolution: Resolution = None, like: Sequence[Any] | None = None
    ) -> PyTree[Array]:
        """What `null_of` needs beside a conditioning: the encoded absence of a prompt, axis 1.

        Args:
          resolution: as in `encode_tokens`.
          like: the token ids of the prompts that it stands beside, whose length it takes; of one
            chunk by default.
        """
        raise NotImplementedError

    def null_of(self, null: PyTree[Array], conditioning: PyTree[Array]) -> PyTree[Array]:
        """The unconditional conditioning that guidance moves away from; traceable.

        It keeps what is no text (sizes, a control image), so it depends on `conditioning`.
        """
        raise NotImplementedError

    @property
    def guidance_is_embedded(self) -> bool:
        """Whether the backbone takes the guidance scale as an input, and needs no second call."""
        return False

    def with_embedded_guidance(self, scale: float) -> "LatentModel":
        """The model that draws as if guided by `scale`.

        Raises:
          ValueError: the backbone has no such input.
        """
        raise ValueError(
            "a guidance scale goes with --teacher: a distilled model draws without guidance, and "
            "this one does not take the scale as an input either"
        )

    def with_text_adapter(self, path: str | Path) -> "LatentModel":
        """The model with an adapter of another text encoder in its own encoders' place.

        Raises:
          FileNotFoundError, ValueError: there is none at `path`, or none that fits the model.
        """
        raise ValueError(f"{self.source}: this model takes no text adapter")

    def with_new_text_adapter(
        self, path: str | Path, key: PRNGKeyArray, hidden_width: int = 2048
    ) -> "LatentModel":
        """As `with_text_adapter`, with a fresh adapter of that width inside, to be trained."""
        raise ValueError(f"{self.source}: this model takes no text adapter")

    # Latents and images.

    @property
    def size(self) -> ImageSize | None:
        """Of the images that the model was trained on; None where it does not say."""
        return None

    def latent_shape(self, resolution: Resolution = None) -> tuple[int, ...]:
        """The shape of one sample's latents; the model's own resolution by default.

        Raises:
          ValueError: a resolution that the model cannot have.
        """
        raise NotImplementedError

    def predict(
        self,
        params: Params,
        z: Float[Array, " b *latent"],
        t: Num[Array, " b"],
        conditioning: PyTree[Array],
        lora: Params | None = None,
        features: bool = False,
        controls: Sequence[Any] = (),
    ) -> Any:
        """The network's raw prediction `[b, *latent]`, as `process.to_x0` reads it; traceable.

        Args:
          params: the backbone's tree.
          z: latents.
          t: times of `process`.
          conditioning: leading axis b.
          lora: an adapter already scaled (`models.lora.scaled`), run beside the weights.
          features: give the states of the blocks of `feature_widths` instead, by name.
          controls: control networks with their weights, as `(network, params)`, in the order of
            what `with_controls` put into the conditioning.
        """
        raise NotImplementedError

    @property
    def feature_widths(self) -> dict[str, int]:
        """Channels of the states that `predict(features=True)` gives, by block."""
        raise NotImplementedError

    @property
    def norm_groups(self) -> int:
        """Groups of group norms that divide every width of `feature_widths`."""
        raise NotImplementedError

    def decode_latents(
        self, params: Params, latents: Float[Array, " b *latent"], tile: int = 0
    ) -> Float[Array, " b *image"]:
        """Images in 0 .. 1; traceable.

        Args:
          params: holds at least the decoder.
          latents: scaled, as the backbone makes them.
          tile: side of the tiles, in latent pixels, that images too large to be decoded at once
            are decoded by; 0 decodes at once.
        """
        raise NotImplementedError

    def decode(
        self, latents: Float[Array, " b *latent"], tile: int = 0
    ) -> Float[Array, " b *image"]:
        """Images in 0 .. 1: `decode_latents`, compiled, by the model's own weights."""
        return self._jitted_decode(self.params, latents, tile=tile)

    @functools.cached_property
    def _jitted_encode(self) -> Callable:
        return jax.jit(self.encode_tokens, static_argnames="resolution")

    @functools.cached_property
    def _jitted_decode(self) -> Callable:
        return jax.jit(self.decode_latents, static_argnames="tile")

    def encode_images(
        self, images: Float[Array, " b *image"], params: Params | None = None
    ) -> Float[Array, " b *latent"]:
        """Scaled latents of images in 0 .. 1; traceable. Not every family has them.

        Args:
          images: of a size that `image_size` gives for some resolution.
          params: holds at least the decoder's component; the model's own by default.
        """
        raise ValueError(f"{self.source}: this model has no encoder of images")

    def image_size(self, resolution: Resolution = None) -> tuple[int, int]:
        """Height and width in pixels of its images; not every family's are pictures.

        Raises:
          ValueError: a resolution that the model cannot have, or no pictures.
        """
        raise ValueError(f"{self.source}: this model does not draw on pictures")

    @property
    def needs_mask(self) -> bool:
        """Whether the backbone is told a mask and what it leaves of a picture (inpainting)."""
        return False

    def with_mask(
        self,
        conditioning: PyTree[Array],
        mask: Float[Array, "b h w 1"],
        left: Float[Array, "b h w c"],
    ) -> PyTree[Array]:
        """A conditioning with what a model that `needs_mask` is told beside the text; traceable.

        Args:
          conditioning: of the texts, leading axis b.
          mask: 1 where something new is drawn.
          left: latents of what the mask leaves.
        """
        raise ValueError(f"{self.source}: this model takes no mask")

    def load_control(self, path: str | Path) -> Any:
        """A control network for this model (`families.controls`); not every family has them.

        Raises:
          FileNotFoundError, ValueError: there is none there, or none for this model.
        """
        raise ValueError(f"--control {path}: no control networks of this model's family are known")

    def new_control(
        self, kind: str, key: PRNGKeyArray, *, channels: int = 3, widths: Sequence[int] = ()
    ) -> Any:
        """A fresh control network for this model, to be trained (`families.new_controls`).

        Returns:
          The network with its weights, and its config.
        """
        raise ValueError(f"{self.source}: no control networks of this model's family are known")

    def with_controls(
        self,
        conditioning: PyTree[Array],
        images: Sequence[Float[Array, "b h w c"]],
        scales: Sequence[float],
    ) -> PyTree[Array]:
        """A conditioning with what steers control networks beside the text; traceable.

        Args:
          conditioning: of the texts, leading axis b.
          images: in 0 .. 1, for each network.
          scales: of each.
        """
        raise ValueError(f"{self.source}: this model takes no control images")

    def denoiser(
        self,
        params: Params | None = None,
        lora: Params | None = None,
        controls: Sequence[Any] = (),
    ) -> Denoiser:
        """The backbone as `(z, t, conditioning) -> x0`, float32.

        Args:
          params: the backbone's tree; the model's own by default.
          lora: an adapter already scaled.
          controls: as of `predict`.
        """
        weights = self.params[self.backbone] if params is None else params

        def denoise(z: Any, t: Any, conditioning: Any) -> Any:
            found = self.predict(weights, z, t, conditioning, lora, controls=controls)
            return self.process.to_x0(found, z, t)

        return denoise


def abstract_params(network: Any, dtype: Any = jnp.float32) -> dict:
    """A network's parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated.

    Args:
      network: a Flax module whose `example` gives inputs to trace its initialisation with.
      dtype: of all leaves.
    """
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype(dtype)), _parameter_shapes(network)
    )


@functools.lru_cache(maxsize=16)
def _parameter_shapes(network: Any) -> Any:
    """Traces the network's initialisation: seconds, so once for each architecture."""
    return jax.eval_shape(network.init, jax.random.key(0), *network.example())["params"]
