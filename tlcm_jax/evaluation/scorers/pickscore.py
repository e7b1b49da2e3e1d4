"""PickScore: which of two images people picked (Kirstain et al., arXiv 2305.01569).

    s = exp(logit_scale) cos(u(image), v(text)),     CLIP ViT-H/14, fine-tuned                 (1)

Around 22 for good images; papers that print 0.22 leave the scale out.
"""

from tlcm_jax.data.tokens import clip_ids
from tlcm_jax.evaluation.scorers.clip import CLIPScorer
from tlcm_jax.evaluation.scorers.preprocess import Preprocess
from tlcm_jax.io.clip_files import load_clip
from tlcm_jax.io.scorer_files import Published, clip_tokenizer

_PUBLISHED = Published(files=("model",), origin="yuvalkirstain/PickScore_v1")


def load(path: str) -> CLIPScorer:
    """Loads PickScore.

    Args:
      path: folder or safetensors file of its weights, the tokenizer beside them.

    Raises:
      FileNotFoundError: weights or tokenizer are missing.
      ValueError: the weights are another network's.
    """
    network, params, folder = load_clip("pickscore", path, "ViT-H-14", _PUBLISHED)
    return CLIPScorer(
        name="pickscore",
        network=network,
        params=params,
        tokenizer=clip_tokenizer(
            "pickscore", folder, _PUBLISHED.origin, network.config.text.vocab_size
        ),
        preprocess=Preprocess(size=network.config.vision.image_size, floor=True),
        tokenize=clip_ids,
        learned_scale=True,
    )
