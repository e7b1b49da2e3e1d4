"""What a file says of itself in its header, in the words of the Stability model metadata standard.

`modelspec.*` is version 1.0.0 of that standard, as sd-scripts writes it; `ss_*` are sd-scripts' own
keys, by which A1111 and Forge sort LoRAs by the models that they go with (a file that has a header
but not these, they take for one of SD 1.x and hide beside an SDXL model).
"""

from collections.abc import Mapping

from tlcm_jax.io.image_size import ImageSize

_ARCHITECTURES = {
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
}
_PREDICTS = {"v_prediction": "v", "epsilon": "epsilon"}
_BASES = {"sdxl": "sdxl_base_v1-0", "sd": "sd_v1", "sd2": "sd_v2"}


def modelspec(
    metadata: Mapping[str, str],
    layout: str,
    *,
    prediction_type: str,
    size: ImageSize,
    rank: int = 0,
) -> dict[str, str]:
    """A header's text.

    Args:
      metadata: the card in short (`model_card.Recipe.metadata`); kept as it is.
      layout: `sdxl`, `sd` or `sd2`, as single files are told apart.
      prediction_type: as diffusers' schedulers call it.
      size: of the images in pixels.
      rank: of the LoRA that the file is; 0 for a whole checkpoint.
    """
    architecture = _ARCHITECTURES[layout]
    if layout == "sd2" and prediction_type == "v_prediction":
        architecture = "stable-diffusion-v2-768-v"
    spec = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + ("/lora" if rank else ""),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": str(size),
    }
    if prediction_type in _PREDICTS:  # there is no word for others
        spec["modelspec.prediction_type"] = _PREDICTS[prediction_type]
    for ours, theirs in (("title", "title"), ("licence", "license")):
        if ours in metadata:
            spec[f"modelspec.{theirs}"] = metadata[ours]
    if rank:
        spec |= {
            "ss_base_model_version": _BASES[layout],
            "ss_v2": str(layout == "sd2"),
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(rank),
        }
    return {**metadata, **spec}
