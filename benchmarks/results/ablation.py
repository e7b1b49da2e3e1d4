"""The paper's ablation (TLCM, arXiv 2406.05768, Table 2) in the world of shapes, and a setting.

The paper adds its parts one by one, each row with all that the rows before it have, at 4 steps:

    1 LCD                              `lcd`: one segment (M = 1); a state is one guided step
                                       of the teacher away from noise
    2 MLCD, single-step states         `single`: 8 segments
    3 + latent LPIPS                   `single_look`
    - MLCD, multistep states           `mlcd`: ours, row 4 without latent LPIPS, so that the step
                                       from row 2 shows by itself
    4 multistep states                 `lpips`: states on the teacher's path, and latent LPIPS
    5 + LCD over all t                 `all_t`: stage 2 on 50 times, 20 apart, not 8 milestones
    6 milestone LCD instead            `milestones`: stage 2 as it is
    7 + MPS                            `preference`: the world's own scorer in MPS's place
    8 + DM                             `matching`
    9 + GAN                            `tlcm`: all of TLCM

Where the paper trains each row's stages to their end, here all rows use the same evaluations, and
stages that are added take theirs from those before. The paper does not say how terms are weighted:
`configs/shapes_full.py` says how they are here.

`SETTINGS` varies the teacher's sub-steps p of stage 2 (the paper: CLIP score 32.78, 32.97, 33.06,
33.10 for 1 to 4).
"""

from benchmarks.results.experiment import Experiment, Table

FULL = "shapes_full:paper"
# The stages' evaluations where they are all there; fewer share them alike.
SHARES = {"segments": 10.0, "endpoints": 3.0, "preference": 1.5, "matching": 3.0}


def _row(name: str, says: str, stages: tuple[str, ...], **changes: object) -> Experiment:
    """A row of the ladder; `changes` by config key below `stages.`, with `__` for each dot."""
    return Experiment(
        name=name,
        says=says,
        recipe=FULL,
        stages=stages,
        changes={"stages." + key.replace("__", "."): value for key, value in changes.items()},
        shares={stage: SHARES[stage] for stage in stages},
    )


_FIRST = ("segments",)
_SECOND = (*_FIRST, "endpoints")
_THIRD = (*_SECOND, "preference")
_LAST = (*_THIRD, "matching")

# One pair a prompt: as many of them as 16 prompts' paths have pairs.
_SINGLE: dict[str, object] = {
    "segments__settings__mode": "one_step_state",
    "segments__prompts_per_refill": 272,
}
_PLAIN: dict[str, object] = {"segments__terms": {}}

TLCM = _row("tlcm", "(9) + adversarial: all of TLCM", _LAST)

LADDER = Table(
    name="ablation",
    title="The parts of TLCM, one by one",
    says="Rows as in the paper's Table 2, each with all that the rows above it have, but `all_t`, "
    "which `milestones` replaces. Numbers in brackets are the paper's rows.",
    experiments=(
        _row(
            "lcd",
            "(1) latent consistency distillation: one segment, single-step states",
            _FIRST,
            segments__settings__segments=1,
            **_SINGLE,
            **_PLAIN,
        ),
        _row("single", "(2) 8 segments, single-step states", _FIRST, **_SINGLE, **_PLAIN),
        _row("single_look", "(3) + latent LPIPS", _FIRST, **_SINGLE),
        _row("mlcd", "multistep states, no latent LPIPS", _FIRST, **_PLAIN),
        _row("lpips", "(4) multistep states, latent LPIPS", _FIRST),
        _row(
            "all_t",
            "(5) + stage 2 over all times",
            _SECOND,
            endpoints__settings__segments=50,
            endpoints__settings__teacher_substeps=1,
        ),
        _row("milestones", "(6) stage 2 at the milestones instead", _SECOND),
        _row("preference", "(7) + preference", _THIRD),
        _row(
            "matching",
            "(8) + distribution matching",
            _LAST,
            matching__terms__adversarial__weight=0.0,
        ),
        TLCM,
    ),
)

PAPER = Experiment(
    name="paper",
    says="`shapes_full.py:stages`: the paper's two stages, p = 3",
    recipe="shapes_full:stages",
)


def _substeps(count: int) -> Experiment:
    return Experiment(
        name=f"p{count}",
        says=f"p = {count}",
        recipe=PAPER.recipe,
        changes={"stages.endpoints.settings.teacher_substeps": count},
    )


SETTINGS = Table(
    name="settings",
    title="Teacher's steps from milestone to milestone",
    says="p of stage 2, without the terms of the rows above.",
    experiments=(_substeps(1), PAPER, _substeps(4)),
)
