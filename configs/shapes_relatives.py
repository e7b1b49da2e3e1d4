"""Related methods in the same code, on shapes-xl: each one a variant.

    python -m tlcm_jax.main --config configs/shapes_relatives.py:lcm --workdir runs/shapes-lcm

    :lcm        LCM (arXiv 2310.04378): one segment, its pseudo-Huber distance
    :pcm        PCM (arXiv 2405.18407): four phases, an adversarial term inside each, weight 0.1
    :hyper_sd   Hyper-SD (arXiv 2404.13686): jumps to any time of a segment, M = 8, 4, 2, 1
    :dmd2       DMD2 (arXiv 2405.14867): distribution matching and an adversarial term, 5 updates
                of the auxiliary networks to 1; no consistency loss
    :decoupled_dmd  decoupled DMD (arXiv 2511.22677): matching alone, guidance at its own times
    :tdm        TDM (arXiv 2503.06674): matching along the student's deterministic trajectory, one
                update of the fake score to 1
    :logcd      the method's second publication: in stage 2 latent LPIPS in place of the square,
                hinge between x0 from t_n and x0 from t_m, rollouts of three steps, no preference
    :mcm        MCM (arXiv 2403.06807): real latents, one time down by adjusted DDIM, as x0
    :scott      SCott (arXiv 2403.01505): real latents, three stochastic steps of the teacher, the
                EMA's target, adversarial against the pictures, weight 0.4

It is each method's idea in this code, with this code's states: the teacher's own paths where the
method has noised pictures, but for `mcm` and `scott`, which need

    python -m miniature.shapes.encode_latents --codec DIR/codec.npz --scaling-factor 0.17 \\
        --output miniature/shapes/latents.npz

The student's states in `dmd2`, `decoupled_dmd` and `tdm` are those of the sampler that draws it in
4 steps. DMD2's discriminator sees pictures; here the student's own samples of 4 steps stand in for
them. `mcm` and `tdm` are drawn without fresh noise. Distances and weights are in this world's
units, as `configs/shapes_full.py` says.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import shapes, shapes_full
from configs.shapes_full import DEVIATION, SQUARE, last_terms, latent_lpips, paper_stages
from tlcm_jax import paths
from tlcm_jax.diffusion.timesteps import student_timesteps

# LCM's and SCott's, of latents of unit deviation.
HUBER = 1e-3 * DEVIATION


def get_config(variant: str = "") -> ConfigDict:
    """The variant's recipe; there is none without one."""
    if variant not in _RECIPES:
        known = ", ".join(f"':{name}'" for name in _RECIPES)
        raise ValueError(f"configs/shapes_relatives.py has no variant {variant!r}; use {known}")
    config = shapes.get_config()
    stages = _RECIPES[variant](config)
    return shapes_full.with_stages(config, variant.replace("_", "-"), stages)


def _segments(config: ConfigDict, segments: int, **settings: Any) -> dict[str, Any]:
    """Stage 1 of the paper with other settings; 17 points a path whatever M."""
    stage = paper_stages(config)["segments"]
    stage["settings"] |= dict(segments=segments, points_per_segment=16 // segments, **settings)
    return stage


def _lcm(config: ConfigDict) -> dict[str, Any]:
    return dict(segments=_segments(config, 1, huber=HUBER))


def _pcm(config: ConfigDict) -> dict[str, Any]:
    # Compared within the phase: t' from the lower milestone to the next one up.
    inside = dict(real="target", times=(0, 62, 125, 187, 249), aux_updates=1)
    adversarial = dict(inside, weight=0.1 * SQUARE, aux_learning_rate=1e-3)
    return dict(segments=dict(_segments(config, 4), terms=dict(adversarial=adversarial)))


def _hyper_sd(config: ConfigDict) -> dict[str, Any]:
    stages = {}
    for segments in (8, 4, 2, 1):
        stage = _segments(config, segments, target_time="uniform")
        warmup_steps = stage["warmup_steps"] if segments == 8 else 0
        stages[f"segments{segments}"] = dict(stage, steps=225, warmup_steps=warmup_steps)
    return stages


def _matching(config: ConfigDict, states: dict[str, Any], **terms: Any) -> dict[str, Any]:
    """A stage of terms alone, asked at all states of the 4-step sampler."""
    stage = paper_stages(config)["endpoints"]
    # No consistency loss, and so no walk of the teacher's.
    settings = dict(
        weight=0.0,
        states="visited",
        rollout_timesteps=student_timesteps(4),
        states_per_rollout=4,
        **states,
    )
    # 16 rollouts of 4 states: 2 updates of 32.
    matching = dict(terms.pop("distribution_matching"), aux_learning_rate=3e-4)
    terms = dict(distribution_matching=matching, **terms)
    return dict(matching=dict(stage, steps=300, warmup_steps=10, settings=settings, terms=terms))


def _dmd2(config: ConfigDict) -> dict[str, Any]:
    return _matching(config, {}, **last_terms(config))


def _decoupled_dmd(config: ConfigDict) -> dict[str, Any]:
    term = last_terms(config)["distribution_matching"]
    return _matching(config, {}, distribution_matching=dict(term, guidance_times="own"))


def _tdm(config: ConfigDict) -> dict[str, Any]:
    config.evaluation.gamma = 0.0
    term = dict(last_terms(config)["distribution_matching"], noised="state", aux_updates=1)
    return _matching(config, dict(rollout_gamma=0.0), distribution_matching=term)


def _logcd(config: ConfigDict) -> dict[str, Any]:
    stages, look = paper_stages(config), latent_lpips(SQUARE)
    stages["endpoints"]["settings"] |= dict(distance="none", rollout_timesteps=student_timesteps(3))
    hinge = dict(real="target", weight=0.1 * SQUARE, aux_updates=1, aux_learning_rate=1e-3)
    return dict(
        segments=dict(stages["segments"], terms=look),
        endpoints=dict(stages["endpoints"], terms=dict(look, adversarial=hinge)),
    )


def _from_pictures(config: ConfigDict, stage: dict[str, Any], **settings: Any) -> dict[str, Any]:
    config.latents = str(paths.MINIATURE / "shapes/latents.npz")
    guidance_scale = stage["settings"]["guidance_scale"]
    # A pair a picture: as many as 16 prompts' paths have.
    return dict(
        stage,
        prompts_per_refill=272,
        settings=dict(mode="data", guidance_scale=guidance_scale, loss_space="x0", **settings),
    )


def _mcm(config: ConfigDict) -> dict[str, Any]:
    config.evaluation.gamma = 0.0
    own = dict(segments=8, skip=1, solver="addim", snr_limit=5.0)
    return dict(segments=_from_pictures(config, _segments(config, 8), **own))


def _scott(config: ConfigDict) -> dict[str, Any]:
    own = dict(segments=1, skip=24, teacher_substeps=3, solver="sde", huber=HUBER, target="ema")
    stage = _from_pictures(config, _segments(config, 1), **own)
    # Three times the evaluations of a pair of the others'.
    adversarial = dict(weight=0.4 * DEVIATION, aux_updates=1, aux_learning_rate=1e-3)
    terms = dict(adversarial=adversarial)
    return dict(segments=dict(stage, steps=300, ema_decay=0.95, terms=terms))


_RECIPES: dict[str, Callable[[ConfigDict], dict[str, Any]]] = {
    "lcm": _lcm,
    "pcm": _pcm,
    "hyper_sd": _hyper_sd,
    "dmd2": _dmd2,
    "decoupled_dmd": _decoupled_dmd,
    "tdm": _tdm,
    "logcd": _logcd,
    "mcm": _mcm,
    "scott": _scott,
}
