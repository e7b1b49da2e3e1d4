"""Human Preference Score v2 and v2.1 (Wu et al., arXiv 2306.09341).

    s = 100 cos(u(image), v(text)),     OpenCLIP ViT-H/14 with plain GELU, fine-tuned           (1)

An image's longer side is brought to 224 and black added around. The two versions are one network
with other weights, and their scores are other numbers: `hps` takes v2.0's file and `hps_v21`
v2.1's, told apart by their published names.
"""

import functools

from tlcm_jax.evaluation.scorers.clip import CLIPScorer
from tlcm_jax.evaluation.scorers.preprocess import Preprocess
from tlcm_jax.io.clip_files import load_clip
from tlcm_jax.io.scorer_files import Published, clip_tokenizer

_PUBLISHED = {
    "hps": Published(files=("HPS_v2_compressed",), origin="xswu/HPSv2", convert=True),
    "hps_v21": Published(files=("HPS_v2.1_compressed",), origin="xswu/HPSv2", convert=True),
}


def load(path: str, *, name: str = "hps_v21") -> CLIPScorer:
    """Loads a version of HPS.

    Args:
      path: folder or safetensors file of its weights, CLIP's tokenizer beside them.
      name: `hps` or `hps_v21`.

    Raises:
      FileNotFoundError: weights or tokenizer are missing.
      ValueError: the weights are another network's, or by their name the other version's.
    """
    published = _PUBLISHED[name]
    for other, each in _PUBLISHED.items():
        if other != name and path.endswith(tuple(f"{file}.safetensors" for file in each.files)):
            raise ValueError(f"{path} is the file of score {other!r}, and not of {name!r}")
    network, params, folder = load_clip(name, path, "ViT-H-14", published)
    return CLIPScorer(
        name=name,
        network=network,
        params=params,
        tokenizer=clip_tokenizer(
            name, folder, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", network.config.text.vocab_size
        ),
        preprocess=Preprocess(size=network.config.vision.image_size, fit="pad"),
    )


LOADERS = {name: functools.partial(load, name=name) for name in _PUBLISHED}
