"""Names of CLIP's tensors in OpenCLIP's files: `visual.*` and the text tower at the top level."""

from collections.abc import Iterable

from tlcm_jax.io.ldm_names import openclip_layer, openclip_text
from tlcm_jax.io.places import Place

_VISION = {
    "embeddings.class_embedding": Place("class_embedding"),
    "embeddings.patch_embedding.weight": Place("conv1.weight"),
    "embeddings.position_embedding.weight": Place("positional_embedding"),
    "pre_layrnorm.weight": Place("ln_pre.weight"),
    "pre_layrnorm.bias": Place("ln_pre.bias"),
    "post_layernorm.weight": Place("ln_post.weight"),
    "post_layernorm.bias": Place("ln_post.bias"),
}


def is_open_clip(names: Iterable[str]) -> bool:
    """Whether a file's names are OpenCLIP's."""
    return "visual.conv1.weight" in set(names)


def open_clip_places(names: Iterable[str]) -> dict[str, Place]:
    """Where OpenCLIP's files keep the tensors of `models.clip`, by the network's names."""
    return {name: _place(name) for name in names}


def _place(name: str) -> Place:
    if name == "logit_scale":
        return Place(name)
    if name == "visual_projection.weight":
        return Place("visual.proj", transposed=True)
    if not name.startswith("vision_model."):
        return openclip_text(name)
    inner = name.removeprefix("vision_model.")
    place = _VISION.get(inner) or openclip_layer(inner)
    if place is None:
        raise ValueError(f"OpenCLIP's layout has no place for {name}")
    return Place(f"visual.{place.key}", place.part)
