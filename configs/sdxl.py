"""SDXL: TLCM as published (arXiv 2406.05768), all of it.

    python -m tlcm_jax.main --config configs/sdxl.py --workdir /gcs/BUCKET/sdxl \\
        --config.model.path=/data/stable-diffusion-xl-base-1.0 \\
        --config.prompts='("/data/prompts.txt",)'

Stage 1 with 8 segments, stage 2 at the milestones, then preference, then distribution matching and
the adversarial term; latent LPIPS beside all of them. Two terms read weights that are not ours to
give: `scorers/latent_lpips`, and `scorers/mps` with `scorers/image_reward` held out
(docs/own-model.md says which files, and where they come from). Those that are not on disk are left
out, and the run begins with a line on each.

    --config configs/sdxl.py:full      the same, and a missing weight is an error
    --config configs/sdxl.py:paper     its two stages without terms
    --config configs/sdxl.py:segments  ours: jumps to any time of a segment, 4 segments and then 2
    --config configs/sdxl.py:guided    ours without guidance, and a tenth of the pairs without
                                       their prompts: a student that takes guidance and negative
                                       prompts at half the speed; not run

None has been run on SDXL to its end. Where a value is not the paper's, the line says whose it is.
The paper ran stage 1 for 12 000 and stage 2 for 2 000 iterations on four A100; batch 16 is
inferred from its released scripts.
"""

import functools
from typing import Any

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """The recipe, or one of its variants: see above."""
    variants = {
        "": functools.partial(_tlcm_stages, optional=True),
        "full": functools.partial(_tlcm_stages, optional=False),
        "paper": _paper_stages,
        "segments": _our_stages,
        "guided": _guided_stages,
    }
    if variant not in variants:
        known = ", ".join(f"':{name}'" for name in variants if name)
        raise ValueError(f"configs/sdxl.py has no variant {variant!r}; use {known}")
    stages = variants[variant]()
    return ConfigDict(
        dict(
            name="sdxl",
            seed=0,
            model=dict(
                path="stable-diffusion-xl-base-1.0",
                dtype="bfloat16",
                param_dtype="bfloat16",
                resolution="1024x1024",
                remat="blocks",
            ),
            prompts=("prompts.txt",),
            # The authors' release: rank 64, alpha not given, so PEFT's default of 8.
            adapter=dict(rank=64, alpha=8.0, merged=False),
            stage_order=tuple(stages),
            stages=stages,
            mesh=dict(data=-1, fsdp=1),
            log_every=10,
            checkpoint_every=250,
            export=("kohya", "lora"),
        )
    )


def _segments(segments: int, steps: int, **settings: Any) -> dict[str, Any]:
    return dict(
        objective="mlcd",
        # Node reuse, ours: 16 prompts' paths of 17 points make 272 pairs, 17 updates of 16.
        steps=steps,
        batch_size=16,
        prompts_per_refill=16,
        learning_rate=1e-4,
        warmup_steps=500,
        settings=dict(
            segments=segments,
            points_per_segment=16 // segments,
            skip=20,
            guidance_scale=8.0,
            **settings,
        ),
    )


def _our_stages() -> dict[str, Any]:
    # Ours: the paper's number of updates, half to each.
    return {f"segments{m}": _segments(m, 6000, target_time="uniform") for m in (4, 2)}


def _guided_stages() -> dict[str, Any]:
    stages = _our_stages()
    for stage in stages.values():
        # 10 %, as classifier-free guidance is trained (Ho & Salimans 2022).
        stage["unconditional"] = 0.1
        stage["settings"]["guidance_scale"] = 1.0
    return stages


def _paper_stages() -> dict[str, Any]:
    endpoints = dict(
        objective="lcd",
        steps=2000,
        batch_size=16,
        learning_rate=1e-5,
        settings=dict(
            segments=8,
            teacher_substeps=3,
            guidance_scale=8.0,
            rollout_timesteps=(999, 749, 499, 249),
        ),
    )
    return dict(segments=_segments(8, 12000), endpoints=endpoints)


def _tlcm_stages(optional: bool) -> dict[str, Any]:
    look = dict(latent_lpips=dict(weights="scorers/latent_lpips", optional=optional))
    stages = {name: dict(stage, terms=look) for name, stage in _paper_stages().items()}
    later = stages["endpoints"]
    preference = dict(
        # s0 = 16, the scorer's own.
        scorers=dict(mps=dict(weights="scorers/mps")),
        held_out="image_reward",
        held_out_weights="scorers/image_reward",
        optional=optional,
    )
    stages["preference"] = dict(
        later, steps=500, batch_size=8, terms=dict(look, preference=preference)
    )
    last = dict(
        # Rates are the paper's; weights and the rest DMD's and ours (docs/method.md).
        distribution_matching=dict(guidance_scale=8.0),
        adversarial=dict(weight=5e-3),
    )
    stages["matching"] = dict(later, steps=1000, batch_size=4, terms=dict(look, **last))
    return stages
