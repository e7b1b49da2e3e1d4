"""The embedded default: distils emoji-xl, the miniature teacher, on whatever machine this is.

    python -m tlcm_jax.main --config configs/emoji.py --workdir runs/emoji

On two idle CPU cores: 9 minutes, with nothing compiled before, previews and evaluation included.
Expect on held-out prompts: object top-1 51 % at 4 steps and 47 % at 2 (the 25-step teacher: 50 %;
in 4 steps: 29 %), Frechet distance 71 and 89 (77; 133).

    --config configs/emoji.py:smoke        a few steps of each stage, to see that all is in place
    --config configs/emoji.py:paper        the paper's two stages
    --config configs/emoji.py:regression   then the ends of whole teacher paths, as one more stage
    --config configs/emoji.py:guided       without guidance, and a tenth of the pairs without their
                                           prompts: for --guidance_scale and --negative_prompt.
                                           Run for a few steps so far; no figures
"""

from typing import Any

from ml_collections import ConfigDict

from tlcm_jax import paths

VARIANTS = ("", "smoke", "paper", "regression", "guided")


def get_config(variant: str = "") -> ConfigDict:
    """The recipe, or one of its variants: see above."""
    if variant not in VARIANTS:
        known = ", ".join(f"':{name}'" for name in VARIANTS if name)
        raise ValueError(f"configs/emoji.py has no variant {variant!r}; use {known}")
    smoke, guided = variant == "smoke", variant == "guided"
    prompts = paths.MINIATURE / "prompts"
    # The teacher's own, and what is distilled in.
    teacher_scale = 5.0
    guidance_scale = 1.0 if guided else teacher_scale
    segments = dict(
        objective="mlcd",
        steps=640,
        # The paths of 16 prompts make 272 pairs: 8 updates of 34.
        batch_size=34,
        prompts_per_refill=16,
        learning_rate=3e-4,
        warmup_steps=10,
        decay="cosine",
        final_fraction=0.1,
        settings=dict(guidance_scale=guidance_scale, points_per_segment=2),
    )
    if guided:
        segments["unconditional"] = 0.1
    if variant == "paper":
        endpoints = dict(
            objective="lcd",
            steps=90,
            # 16 rollouts of 4 states: 2 updates of 32.
            batch_size=32,
            prompts_per_refill=16,
            learning_rate=3e-4,
            decay="cosine",
            final_fraction=0.1,
            settings=dict(guidance_scale=guidance_scale, teacher_substeps=2, states_per_rollout=4),
        )
        stages = dict(segments=segments, endpoints=endpoints)
    else:
        # Jumps to any time of a segment, 4 segments and then 2: 17 points a path as with 8.
        stages = {
            f"segments{count}": dict(
                segments,
                steps=16 if smoke else 312,
                settings=dict(
                    segments["settings"],
                    segments=count,
                    points_per_segment=16 // count,
                    target_time="uniform",
                ),
            )
            for count in (4, 2)
        }
    if variant == "regression":
        stages["trajectories"] = dict(
            objective="trajectory_kd",
            steps=120,
            # 16 paths of 8 milestones: 4 updates of 32.
            batch_size=32,
            prompts_per_refill=16,
            learning_rate=1e-4,
            warmup_steps=20,
            decay="cosine",
            final_fraction=0.05,
            settings=dict(guidance_scale=guidance_scale, teacher_substeps=2, own_states=0.3),
        )
    return ConfigDict(
        dict(
            name="emoji-xl",
            seed=0,
            model=dict(path=str(paths.EMOJI_XL), dtype="float32"),
            prompts=(str(prompts / "train.txt"),),
            adapter=dict(rank=64, alpha=64.0, merged=True),
            stage_order=tuple(stages),
            stages=stages,
            mesh=dict(data=-1, fsdp=1),
            log_every=8 if smoke else 40,
            sample_every=156,
            checkpoint_every=160,
            evaluation=dict(
                prompts=(str(prompts / "heldout.txt"), str(prompts / "composition.txt")),
                scorers=("miniature.judge",),
                guidance_scale=teacher_scale,
                student_guidance_scales=(3.0, 1.0, 2.0, 5.0) if guided else (1.0,),
                limit=16 if smoke else 0,
            ),
            export=("lora", "pipeline"),
        )
    )


def latent_lpips(**changes: Any) -> dict[str, Any]:
    """Latent LPIPS by the miniature's own weights, as a stage's terms have it."""
    return dict(latent_lpips=dict(weights=str(paths.MINIATURE / "latent_lpips"), **changes))


def relative(name: str, variant: str, *stages: str) -> ConfigDict:
    """What `emoji_NAME.py`, another recipe of this folder, starts from: `:paper`, these stages."""
    if variant:
        raise ValueError(f"configs/emoji_{name}.py has no variant {variant!r}")
    config = get_config("paper")
    config.name = f"emoji-xl-{name.replace('_', '-')}"
    config.stages = {stage: config.stages[stage] for stage in stages}
    config.stage_order = stages
    return config
