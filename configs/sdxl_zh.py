"""A Chinese adapter for SDXL, by PEA-Diffusion's recipe (Ma et al., arXiv 2311.17086).

    python -m tlcm_jax.train_text_adapter --config configs/sdxl_zh.py --pairs pairs.tsv \\
        --lora student.safetensors --output zh

The loss is the error against the noise, that against the English teacher's prediction, and a tenth
of that of the states after SDXL's seven blocks (three down, the middle, three up); a tenth of the
pairs are shown without prompts. `pairs.tsv` has a line for each pair: the English prompt, a tab,
the Chinese one. Any value is changed by its flag, as `--pairs` above. Not run on SDXL.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The values of `train_text_adapter`'s flags."""
    return ConfigDict(
        dict(
            model="stabilityai/stable-diffusion-xl-base-1.0",
            # OFA-Sys/chinese-clip-vit-huge-patch14, its weights as safetensors.
            text_encoder="chinese-clip-vit-huge-patch14",
            hidden_width=2048,
            learning_rate=1e-5,
            weight_decay=0.1,
            unconditional=0.1,
            feature_weight=0.1,
            # Ours.
            steps=20000,
            batch=16,
            sample_steps=4,
        )
    )
