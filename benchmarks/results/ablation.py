"""The paper's ablation (TLCM, arXiv 2406.05768, Table 2) on the miniature, and two of its settings.

The paper adds its parts one by one, each row with all that the rows before it have, at 4 steps:

    1 LCD                              `lcd`: one segment (M = 1); a state is one guided step
                                       of the teacher away from noise
    2 MLCD, single-step states         `single`: 8 segments
    3 + latent LPIPS                   `single_look`
    - MLCD, multistep states           `mlcd`: ours, row 4 without latent LPIPS, so that the step
                                       from row 2 shows by itself
    4 multistep states                 `lpips`: states on the teacher's path, and latent LPIPS
    - the same at a tenth              `lpips_tenth`: ours, see below
    5 + LCD over all t                 `all_t`: stage 2 on 50 times, 20 apart, not 8 milestones
    6 milestone LCD instead            `milestones`: stage 2 as it is
    7 + MPS                            `preference`: the miniature's own scorer in MPS's place
    8 + DM                             `matching`
    9 + GAN                            `adversarial`: all of TLCM

Where the paper trains each row's stages to their end, here all rows use the same evaluations, and
stages that are added take theirs from those before. The last two stages have updates of 8 pairs
(the paper's batch is 4): at 32 they would have only some twenty.

The paper does not say how latent LPIPS is weighted. The rows have it at 1, where its gradient is 5
to 10 times the mean square's, and `lpips_tenth` has it about as large.

`SETTINGS` varies two things of the paper's two stages, `emoji.py:paper`: the teacher's sub-steps p
of stage 2 (the paper: CLIP score 32.78, 32.97, 33.06, 33.10 for 1 to 4), and M falling 8, 4, 2 in
stage 1 as its first versions had it.
"""

from benchmarks.results.experiment import Experiment, Table

FULL = "emoji_full:paper"
# The stages' evaluations where they are all there; fewer share them alike.
SHARES = {"segments8": 10.0, "endpoints": 3.0, "preference": 1.5, "matching": 3.0}
_LATER = {"stages.preference.batch_size": 8, "stages.matching.batch_size": 8}


def _row(name: str, says: str, stages: tuple[str, ...], **changes: object) -> Experiment:
    """A row of the ladder; `changes` by config key below `stages.`, with `__` for each dot."""
    kept = {key: value for key, value in _LATER.items() if key.split(".", 2)[1] in stages} | {
        "stages." + key.replace("__", "."): value for key, value in changes.items()
    }
    return Experiment(
        name=name,
        says=says,
        recipe=FULL,
        stages=stages,
        changes=kept,
        shares={stage: SHARES[stage] for stage in stages},
    )


_FIRST = ("segments8",)
_SECOND = (*_FIRST, "endpoints")
_THIRD = (*_SECOND, "preference")
_LAST = (*_THIRD, "matching")

# One pair a prompt: as many of them as 16 prompts' paths have pairs.
_SINGLE: dict[str, object] = {
    "segments8__settings__mode": "one_step_state",
    "segments8__prompts_per_refill": 272,
}
_PLAIN: dict[str, object] = {"segments8__terms": {}}

LADDER = Table(
    name="ablation",
    title="The parts of TLCM, one by one",
    says="Rows as in the paper's Table 2, each with all that the rows above it have, but "
    "`lpips_tenth`, which stands alone, and `all_t`, which `milestones` replaces. Numbers in "
    "brackets are the paper's rows.",
    experiments=(
        _row(
            "lcd",
            "(1) latent consistency distillation: one segment, single-step states",
            _FIRST,
            segments8__settings__segments=1,
            **_SINGLE,
            **_PLAIN,
        ),
        _row("single", "(2) 8 segments, single-step states", _FIRST, **_SINGLE, **_PLAIN),
        _row("single_look", "(3) + latent LPIPS", _FIRST, **_SINGLE),
        _row("mlcd", "multistep states, no latent LPIPS", _FIRST, **_PLAIN),
        _row("lpips", "(4) multistep states, latent LPIPS", _FIRST),
        _row(
            "lpips_tenth",
            "row 4 with latent LPIPS at 0.1, not 1",
            _FIRST,
            segments8__terms__latent_lpips__weight=0.1,
        ),
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
        _row("adversarial", "(9) + adversarial: all of TLCM", _LAST),
    ),
)

PAPER = Experiment(
    name="paper", says="`emoji.py:paper`: the paper's two stages, p = 2", recipe="emoji:paper"
)


def _substeps(count: int) -> Experiment:
    return Experiment(
        name=f"p{count}",
        says=f"p = {count} teacher steps from milestone to milestone",
        recipe="emoji:paper",
        changes={"stages.endpoints.settings.teacher_substeps": count},
    )


_PROGRESSIVE = ("segments8", "segments4", "segments2")

SETTINGS = Table(
    name="settings",
    title="Settings of the paper's two stages",
    says="Without the terms of the rows above.",
    experiments=(
        PAPER,
        *(_substeps(count) for count in (1, 3, 4)),
        Experiment(
            name="progressive",
            says="M falls 8, 4, 2 in stage 1",
            recipe=FULL,
            stages=(*_PROGRESSIVE, "endpoints"),
            changes={f"stages.{name}.terms": {} for name in (*_PROGRESSIVE, "endpoints")},
            # Stage 1 and stage 2 as they share in `emoji.py:paper`.
            shares={**dict.fromkeys(_PROGRESSIVE, 0.27), "endpoints": 0.19},
        ),
    ),
)
