"""What a single file says of its noise schedule: marker tensors, and a line in its header.

ComfyUI, Forge and A1111 read no scheduler config: to them a file predicts eps unless it says
otherwise.

| mark | meaning |
|---|---|
| tensor `v_pred` | the UNet predicts v |
| tensor `ztsnr`, beside it | zero terminal SNR |
| `modelspec.prediction_type` in the header | `v` or `epsilon`, as kohya's trainer writes it |
| tensors `edm_mean`, `edm_std` | Playground v2.5: EDM's schedule and latents of another scale |
| tensors `edm_vpred.*` | CosXL: EDM's schedule, v prediction |
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from absl import logging

V_MARK, SNR_MARK, HEADER = "v_pred", "ztsnr", "modelspec.prediction_type"
_EDM = ("edm_mean", "edm_std")
_EDM_V = "edm_vpred."
_SPELLED_V = ("v", "v_prediction", "v-prediction", "vpred", "v_pred")


def is_mark(key: str) -> bool:
    """Whether a tensor is one of the marks."""
    return key in (V_MARK, SNR_MARK, *_EDM) or key.startswith(_EDM_V)


def marked_scheduler(
    config: Mapping[str, Any],
    keys: Collection[str],
    metadata: Mapping[str, str],
    source: str,
    *,
    own: bool,
) -> dict[str, Any]:
    """A scheduler's config, corrected by what the file says.

    A file that says v is believed over a config that says eps, with a warning: other programs draw
    it so. `modelspec`'s "epsilon" is not, as tools write it without looking.

    Args:
      config: a `scheduler_config.json`.
      keys: names of the file's tensors.
      metadata: the file's header.
      source: the file, for messages.
      own: the config was given with the file, rather than its family's published one.

    Raises:
      ValueError: the file's schedule is none that is supported.
    """
    if any(key in keys for key in _EDM):
        raise ValueError(
            f"{source} says ({', '.join(_EDM)}) that it has EDM's noise schedule and latents of a "
            "scale of their own (Playground v2.5), which are not supported"
        )
    if any(key.startswith(_EDM_V) for key in keys):
        if not own:
            raise ValueError(
                f"{source} says ({_EDM_V}*) that it has EDM's noise schedule with v prediction "
                "(CosXL), which is not supported"
            )
        logging.warning(
            "%s: its %s* say EDM's noise schedule; its config's is taken", source, _EDM_V
        )
    result = dict(config)
    said = metadata.get(HEADER, "").strip().lower()
    if V_MARK in keys or said in _SPELLED_V:
        if own and (config.get("prediction_type") or "epsilon") == "epsilon":
            logging.warning("%s says that it predicts v, its config eps: v is taken", source)
        result["prediction_type"] = "v_prediction"
    if SNR_MARK in keys:
        if result.get("prediction_type") == "v_prediction":
            result["rescale_betas_zero_snr"] = True
        else:
            logging.warning("%s: %s without %s is left out", source, SNR_MARK, V_MARK)
    return result


def marks_of(scheduler: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The marks that a single file of a model with this scheduler needs: tensors, and metadata."""
    if scheduler.get("prediction_type") != "v_prediction":
        return {}, {}
    empty = np.zeros(0, np.float32)
    tensors = {V_MARK: empty}
    if scheduler.get("rescale_betas_zero_snr"):
        tensors[SNR_MARK] = empty
    return tensors, {HEADER: "v"}
