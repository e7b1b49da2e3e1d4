"""The shapes world: distils shapes-xl, whose pictures a parser reads, on whatever machine this is.

    python -m tlcm_jax.main --config configs/shapes.py --workdir runs/shapes \\
        --config.model.path=runs/shapes-teacher/shapes-xl

The teacher is trained as miniature/shapes/README.md says; rung `r1`, one object in a picture.

    --config configs/shapes.py:smoke        a few steps of each stage, to see that all is in place
    --config configs/shapes.py:preference   then a stage that follows the contrastive scorer by
                                            its gradient
    --config configs/shapes.py:reward       then one that follows it by rewards, with as many calls
                                            of the UNet; not yet compared on test prompts
    --config configs/shapes.py:guided       without guidance, and a tenth of the pairs without their
                                            prompts: for --guidance_scale and --negative_prompt
"""

from ml_collections import ConfigDict

from tlcm_jax import paths

# The latents' deviation is 0.07, and gradients of a millionth are usual: 1e-8 would swallow them.
ADAM_EPS = 1e-13
VARIANTS = ("", "smoke", "preference", "reward", "guided")

# The same scorer, by its gradient and by rewards; the parser, which none follows, judges.
SCORER = dict(contrastive=dict(scorer="miniature.shapes.contrastive"))
FOLLOWING = {
    "preference": dict(scorers=SCORER),
    # A tenth where latents have unit deviation; the consistency loss's gradient is 0.07 of that.
    "reward": dict(weight=0.007, scorers=SCORER, held_out="miniature.shapes.scorer"),
}


def get_config(variant: str = "") -> ConfigDict:
    """The recipe, or one of its variants: see above."""
    if variant not in VARIANTS:
        known = ", ".join(f"':{name}'" for name in VARIANTS if name)
        raise ValueError(f"configs/shapes.py has no variant {variant!r}; use {known}")
    smoke, guided = variant == "smoke", variant == "guided"
    prompts = paths.MINIATURE / "shapes/prompts/r1"
    # The teacher's own, and what is distilled in.
    teacher_scale = 3.0
    guidance_scale = 1.0 if guided else teacher_scale
    stages = {
        f"segments{count}": dict(
            objective="mlcd",
            steps=16 if smoke else 600,
            # The paths of 16 prompts make 272 pairs: 8 updates of 34.
            batch_size=34,
            prompts_per_refill=16,
            learning_rate=3e-4,
            warmup_steps=10,
            decay="cosine",
            final_fraction=0.1,
            adam_eps=ADAM_EPS,
            unconditional=0.1 if guided else 0.0,
            settings=dict(
                segments=count,
                points_per_segment=16 // count,
                target_time="uniform",
                guidance_scale=guidance_scale,
            ),
        )
        for count in (4, 2)
    }
    if variant in FOLLOWING:
        stages[variant] = dict(
            objective="lcd",
            steps=300,
            # 32 rollouts, each asked at 2 of the states it came through: 4 updates of 16.
            batch_size=16,
            prompts_per_refill=32,
            learning_rate=1e-4,
            warmup_steps=20,
            adam_eps=ADAM_EPS,
            settings=dict(
                guidance_scale=guidance_scale,
                teacher_substeps=2,
                states="visited",
                states_per_rollout=2,
            ),
            terms={variant: FOLLOWING[variant]},
        )
    return ConfigDict(
        dict(
            name="shapes-xl",
            seed=0,
            model=dict(path=str(paths.MINIATURE / "shapes-xl"), dtype="float32"),
            prompts=(str(prompts / "train.txt"),),
            adapter=dict(rank=64, alpha=64.0, merged=True),
            stage_order=tuple(stages),
            stages=stages,
            mesh=dict(data=-1, fsdp=1),
            log_every=8 if smoke else 40,
            sample_every=300,
            checkpoint_every=160,
            evaluation=dict(
                prompts=(str(prompts / "test.txt"), str(prompts / "composition.txt")),
                scorers=("miniature.shapes.scorer", "miniature.shapes.open_attributes"),
                guidance_scale=teacher_scale,
                student_guidance_scales=(3.0, 1.0, 2.0, 4.0, 5.0) if guided else (1.0,),
                undistilled=(2, 3, 4),
                limit=16 if smoke else 0,
            ),
            export=("lora", "pipeline"),
        )
    )
