"""CLIP: a picture tower and a text tower whose outputs meet in one space (arXiv 2103.00020).

    u(image) = P_v norm(V(image))_class,      v(text) = P_t norm(T(text))_end
    score    = cos(u, v), times exp(logit_scale) where a scorer says so                        (1)

Named as in transformers' `CLIPModel`; OpenCLIP's own names are another dialect of the same network
(`io/clip_names.py`). The published sizes are in `ARCHITECTURES`, as open_clip's configs give them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlcm_jax.models.clip_encoder import ACTIVATIONS, CLIPEncoder
from tlcm_jax.models.clip_text import CLIPTextConfig, CLIPTextTransformer
from tlcm_jax.models.layers import Conv, Dense, Dtype, layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """Architecture of a CLIP picture tower; the names are transformers' own.

    Attributes:
      image_size: side of the pictures in pixels.
      patch_size: side of a patch.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Both towers, and the width of the space they meet in."""

    vision: CLIPVisionConfig
    text: CLIPTextConfig
    projection_dim: int

    @classmethod
    def from_transformers(cls, raw: Mapping[str, Any]) -> "CLIPConfig":
        """Parses transformers' `config.json` of a `CLIPModel`; what it leaves out has its defaults.

        Raises:
          ValueError: the config is of another kind of model, or its activation is not known.
        """
        if raw.get("model_type") != "clip":
            raise ValueError(f"config: model_type {raw.get('model_type')!r} is not 'clip'")
        # Older files keep each tower's choices under a second name too, which transformers takes
        # in place of the first unless it is null.
        text = raw.get("text_config_dict") or raw.get("text_config") or {}
        vision = raw.get("vision_config_dict") or raw.get("vision_config") or {}
        return cls(
            vision=CLIPVisionConfig(
                image_size=vision.get("image_size", 224),
                patch_size=vision.get("patch_size", 32),
                hidden_size=vision.get("hidden_size", 768),
                intermediate_size=vision.get("intermediate_size", 3072),
                num_hidden_layers=vision.get("num_hidden_layers", 12),
                num_attention_heads=vision.get("num_attention_heads", 12),
                hidden_act=_known(vision.get("hidden_act", "quick_gelu")),
                layer_norm_eps=vision.get("layer_norm_eps", 1e-5),
            ),
            text=_text_config(
                vocab_size=text.get("vocab_size", 49408),
                hidden_size=text.get("hidden_size", 512),
                intermediate_size=text.get("intermediate_size", 2048),
                num_hidden_layers=text.get("num_hidden_layers", 12),
                num_attention_heads=text.get("num_attention_heads", 8),
                max_position_embeddings=text.get("max_position_embeddings", 77),
                hidden_act=_known(text.get("hidden_act", "quick_gelu")),
                layer_norm_eps=text.get("layer_norm_eps", 1e-5),
            ),
            projection_dim=raw.get("projection_dim", 512),
        )

    @classmethod
    def from_open_clip(cls, raw: Mapping[str, Any]) -> "CLIPConfig":
        """Parses open_clip's model config, also as `open_clip_config.json` wraps it.

        Raises:
          ValueError: the config is of a network that is not this one.
        """
        raw = raw.get("model_cfg", raw)
        vision, text = raw.get("vision_cfg", {}), raw.get("text_cfg", {})
        strange = sorted((vision.keys() - _VISION_KEYS) | (text.keys() - _TEXT_KEYS))
        if strange or not isinstance(vision.get("layers"), int) or "embed_dim" not in raw:
            raise ValueError(
                "open_clip config: only plain ViT towers are known here"
                + (f", and this one sets {', '.join(strange)}" if strange else "")
            )
        quick = raw.get("quick_gelu", False)
        if not isinstance(quick, bool | None):
            raise ValueError(f"open_clip config: quick_gelu = {quick!r}: must be true or false")
        activation = "quick_gelu" if quick else "gelu"
        width = vision["width"]
        return cls(
            vision=CLIPVisionConfig(
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                hidden_size=width,
                intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
                num_hidden_layers=vision["layers"],
                num_attention_heads=width // vision.get("head_width", 64),
                hidden_act=activation,
            ),
            text=_text_config(
                vocab_size=text.get("vocab_size", 49408),
                hidden_size=text["width"],
                intermediate_size=int(text["width"] * text.get("mlp_ratio", 4.0)),
                num_hidden_layers=text["layers"],
                num_attention_heads=text["heads"],
                max_position_embeddings=text.get("context_length", 77),
                hidden_act=activation,
                layer_norm_eps=1e-5,
            ),
            projection_dim=raw["embed_dim"],
        )


_VISION_KEYS = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"config: hidden_act={activation!r} is not one of {sorted(ACTIVATIONS)}")
    return activation


def _text_config(**fields: Any) -> CLIPTextConfig:
    """A text tower whose end is the largest id, whatever follows it: open_clip's way (`argmax`)."""
    return CLIPTextConfig(**fields, eos_token_id=2, projection_dim=None)


def _published(
    embed: int, vision: tuple[int, ...], text: tuple[int, int, int], **choices: Any
) -> CLIPConfig:
    layers, width, head, patch = vision
    depth, hidden, heads = text
    size = choices.pop("image_size", 224)
    towers = {
        "vision_cfg": {
            "image_size": size, "layers": layers, "width": width, "head_width": head,
            "patch_size": patch, "mlp_ratio": choices.pop("mlp_ratio", 4.0),
        },
        "text_cfg": {"width": hidden, "heads": heads, "layers": depth},
    }  # fmt: skip
    return CLIPConfig.from_open_clip({"embed_dim": embed, **towers, **choices})


# By open_clip's names; OpenAI's weights belong to those with `quickgelu`.
ARCHITECTURES: Mapping[str, CLIPConfig] = {
    "ViT-g-14": _published(1024, (40, 1408, 88, 14), (24, 1024, 16), mlp_ratio=4.3637),
    "ViT-H-14": _published(1024, (32, 1280, 80, 14), (24, 1024, 16)),
    "ViT-L-14": _published(768, (24, 1024, 64, 14), (12, 768, 12)),
    "ViT-L-14-quickgelu": _published(768, (24, 1024, 64, 14), (12, 768, 12), quick_gelu=True),
    "ViT-L-14-336-quickgelu": _published(
        768, (24, 1024, 64, 14), (12, 768, 12), quick_gelu=True, image_size=336
    ),
    "ViT-B-32-quickgelu": _published(512, (12, 768, 64, 32), (12, 512, 8), quick_gelu=True),
}


class CLIPVisionTransformer(nn.Module):
    """The picture tower: all tokens after the last layer, and the class token after its norm.

    Pictures are `[b, image_size, image_size, 3]`, already normalised.
    """

    config: CLIPVisionConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b s s 3"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
        config = self.config
        x = _VisionEmbeddings(config, self.dtype, name="embeddings")(pixels)
        # The checkpoints' own spelling.
        x = layer_norm(config.layer_norm_eps, self.dtype, "pre_layrnorm")(x)
        x = CLIPEncoder(config, self.dtype, name="encoder")(x)[-1]
        return x, layer_norm(config.layer_norm_eps, self.dtype, "post_layernorm")(x[:, 0])


class _VisionEmbeddings(nn.Module):
    config: CLIPVisionConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        config, patch = self.config, self.config.patch_size
        patches = Conv(
            config.hidden_size, patch, strides=patch, padding=0, use_bias=False, dtype=self.dtype,
            name="patch_embedding",
        )(pixels)  # fmt: skip
        patches = patches.reshape(len(pixels), -1, config.hidden_size)
        first = self.param(
            "class_embedding", nn.initializers.normal(0.02), (config.hidden_size,), jnp.float32
        )
        first = jnp.broadcast_to(first.astype(self.dtype), (len(pixels), 1, config.hidden_size))
        x = jnp.concatenate([first, patches], axis=1)
        positions = nn.Embed(
            1 + (config.image_size // patch) ** 2, config.hidden_size, dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.02), name="position_embedding",
        )  # fmt: skip
        return x + positions(jnp.arange(x.shape[1]))


class CLIPModel(nn.Module):
    """Both towers. Matches transformers' `CLIPModel` and open_clip's `CLIP`.

    Pictures must be normalised already, texts be token ids whose largest is the end of text.
    """

    config: CLIPConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        config = self.config
        self.vision_model = CLIPVisionTransformer(config.vision, self.dtype)
        self.text_model = CLIPTextTransformer(config.text, self.dtype)
        self.visual_projection = Dense(config.projection_dim, use_bias=False, dtype=self.dtype)
        self.text_projection = Dense(config.projection_dim, use_bias=False, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def encode_image(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b e"]:
        """The u of equation (1), not normalised."""
        return self.visual_projection(self.vision_model(pixels)[1])

    def class_token(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
        """The picture tower's output after its norm, not projected."""
        return self.vision_model(pixels)[1]

    def encode_text(self, ids: Int[Array, "b n"]) -> Float[Array, "b e"]:
        """The v of equation (1), not normalised."""
        return self.text_projection(self._text(ids)[1])

    def image_tokens(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b m e"]:
        """Every token of the last layer, projected without the norm: what MPS reads."""
        return self.visual_projection(self.vision_model(pixels)[0])

    def text_tokens(
        self, ids: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n e"], Float[Array, "b e"]]:
        """Every token after the final norm, projected, and the one at the end of the text."""
        last, end = self._text(ids)
        return self.text_projection(last), self.text_projection(end)

    def _text(self, ids: Array) -> tuple[Array, Array]:
        _, last = self.text_model(ids)
        end = jnp.argmax(ids, axis=-1)
        return last, jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]

    def __call__(
        self, pixels: Float[Array, "b s s 3"], ids: Int[Array, "c n"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "c e"], Float[Array, ""]]:
        """Vectors of pictures and texts of length 1, and exp(logit_scale)."""
        return (
            unit(self.encode_image(pixels)),
            unit(self.encode_text(ids)),
            jnp.exp(self.logit_scale),
        )


def unit(x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Vectors over their length, in fp32; as `torch.nn.functional.normalize`."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
