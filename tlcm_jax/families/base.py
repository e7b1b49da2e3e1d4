"""What a model family is: everything that distillation, sampling and export ask of a model.

A family is its networks (in `models/`) and one file beside this one. The engine never names a
component of its own: the trained network is `params[backbone]`, whatever the family calls it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Array, Float, Num, PyTree

from tlcm_jax.diffusion.guidance import Denoiser
from tlcm_jax.diffusion.process import Process
from tlcm_jax.models.lora import TARGETS

Params = Mapping[str, Any]


class LatentModel:
    """A text-conditioned generator of latents: pure functions of its parameters.

    Attributes:
      process: how its data becomes noise, and what its network predicts.
      params: a tree for each component.
      backbone: the component that is trained and adapted.
      decoder: the component that `decode_latents` reads.
      tokenizers: of its text encoders, where they are `transformers`' own.
      lora_targets: endings of the names of the layers that an adapter changes by default.
      unused_by_features: beginnings of the names of the backbone's layers that the states of
        `predict(features=True)` do not depend on.
    """

    process: Process
    params: Params
    backbone: ClassVar[str]
    decoder: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]] = TARGETS
    unused_by_features: ClassVar[tuple[str, ...]] = ()

    @property
    def dtype(self) -> Any:
        """The networks' compute dtype."""
        raise NotImplementedError

    @property
    def norm_groups(self) -> int:
        """Groups of group norms that divide every width of `feature_widths`."""
        raise NotImplementedError

    tokenizers: tuple[Any, ...]

    def check_teacher(self) -> None:
        """Raises a ValueError, which says why, if the model cannot be distilled."""

    @property
    def text_params(self) -> dict[str, Any]:
        """The part of `params` that `encode_tokens` reads."""
        raise NotImplementedError

    def latent_shape(self, resolution: int | None = None) -> tuple[int, ...]:
        """The shape of one sample's latents; the model's own resolution by default.

        Raises:
          ValueError: a resolution that the model cannot have.
        """
        raise NotImplementedError

    def tokenize(self, prompts: Sequence[str]) -> tuple[Any, ...]:
        """Token ids on the host, one array for each text encoder, `[n, ...]` each."""
        raise NotImplementedError

    def encode_tokens(
        self, params: Params, ids: Sequence[Array], resolution: int | None = None
    ) -> PyTree[Array]:
        """Conditioning of tokenized prompts, leading axis n; traceable.

        Args:
          params: at least `text_params`.
          ids: what `tokenize` returns.
          resolution: of the images that are to be drawn.
        """
        raise NotImplementedError

    def null_conditioning(self, resolution: int | None = None) -> PyTree[Array]:
        """What `null_of` needs beside a conditioning: the encoded absence of a prompt, axis 1."""
        raise NotImplementedError

    def null_of(self, null: PyTree[Array], conditioning: PyTree[Array]) -> PyTree[Array]:
        """The unconditional conditioning that guidance moves away from; traceable.

        It keeps what is no text (sizes, a control image), so it depends on `conditioning`.
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
    ) -> Any:
        """The network's raw prediction `[b, *latent]`, as `process.to_x0` reads it; traceable.

        Args:
          params: the backbone's tree.
          z: latents.
          t: times of `process`.
          conditioning: leading axis b.
          lora: an adapter already scaled (`models.lora.scaled`), run beside the weights.
          features: give the states of the blocks of `feature_widths` instead, by name.
        """
        raise NotImplementedError

    @property
    def feature_widths(self) -> dict[str, int]:
        """Channels of the states that `predict(features=True)` gives, by block."""
        raise NotImplementedError

    def decode_latents(
        self, params: Params, latents: Float[Array, " b *latent"]
    ) -> Float[Array, " b *image"]:
        """Images in 0 .. 1; traceable. `params` holds at least the decoder."""
        raise NotImplementedError

    def denoiser(self, params: Params | None = None, lora: Params | None = None) -> Denoiser:
        """The backbone as `(z, t, conditioning) -> x0`, float32.

        Args:
          params: the backbone's tree; the model's own by default.
          lora: an adapter already scaled.
        """
        weights = self.params[self.backbone] if params is None else params

        def denoise(z: Any, t: Any, conditioning: Any) -> Any:
            return self.process.to_x0(self.predict(weights, z, t, conditioning, lora), z, t)

        return denoise
