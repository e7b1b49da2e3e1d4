"""Changes of ours to the paper's recipe, one at a time, at the same number of UNet evaluations.

`STAGES` changes `shapes_full.py:stages`. Where a change alters how many pairs a prompt makes, the
prompts of a refill change with it, and an update still has 32 to 36 pairs: at equal evaluations a
pair's cost alone then decides how many updates there are.

    landing       jumps to any time of a segment, as Hyper-SD's, against its milestone
    literal       the paper's algorithm, one pair a path, against node reuse
    nodes1, 4     points a segment, and so a path: 9 and 33 against 17
    loss_x0       the loss as x0, weighted by min(SNR + 1, 5), against z
    states1       one state a rollout in stage 2, the paper's, against 2
    ema           the average of stage 2's updates is what is drawn with, against the last one

`PARTS` takes `shapes.py`, the default, apart.

    jumps4        its first stage alone, 4 segments
    jumps2        its second alone, 2 segments
    jumps_x0      both, the loss as x0, weighted by min(SNR + 1, 5), against z
    average       both, drawn with the average of the second's updates, against the last one
    liked         both, and then a stage that follows the world's scorer
"""

from benchmarks.results.ablation import PAPER
from benchmarks.results.experiment import DEFAULT, Experiment, Table
from benchmarks.results.recipes import OURS

_STEPS = (2, 4)
# All measures at several step counts would bury what these tables say.
_FOLLOWED = ("all_checks", "open_attributes")


def _paper(name: str, says: str, **changes: object) -> Experiment:
    """The paper's recipe; `changes` by config key below `stages.`, with `__` for each dot."""
    return _changed(PAPER.recipe, name, says, changes)


def _changed(
    recipe: str, name: str, says: str, changes: dict[str, object], stages: tuple[str, ...] = ()
) -> Experiment:
    dotted = {"stages." + key.replace("__", "."): value for key, value in changes.items()}
    return Experiment(name=name, says=says, recipe=recipe, stages=stages, changes=dotted)


def _points(count: int, prompts: int, batch_size: int) -> Experiment:
    return _paper(
        f"nodes{count}",
        f"{8 * count + 1} points a path",
        segments__settings__points_per_segment=count,
        segments__prompts_per_refill=prompts,
        segments__batch_size=batch_size,
    )


STAGES = Table(
    name="improvements",
    title="Changes to the paper's stages",
    says="Each row changes one thing of `paper`: node reuse with 17 points a path, jumps to the "
    "milestones, the loss in z, 2 states a rollout.",
    steps=_STEPS,
    followed=_FOLLOWED,
    against="paper",
    experiments=(
        PAPER,
        _paper(
            "landing",
            "jumps to any time between, as Hyper-SD's",
            segments__settings__target_time="uniform",
        ),
        _paper(
            "literal",
            "the paper's literal algorithm: one pair a path",
            segments__settings__mode="paper",
            segments__prompts_per_refill=68,
        ),
        _points(1, prompts=32, batch_size=36),
        _points(4, prompts=8, batch_size=33),
        _paper(
            "loss_x0",
            "loss as x0, weighted by min(SNR + 1, 5)",
            segments__settings__loss_space="x0",
        ),
        _paper(
            "states1",
            "1 state a rollout",
            endpoints__settings__states_per_rollout=1,
            endpoints__prompts_per_refill=32,
        ),
        _paper("ema", "average of stage 2's updates, decay 0.95", endpoints__ema_decay=0.95),
    ),
)

PARTS = Table(
    name="parts",
    title="The default, taken apart",
    says="`default` is two stages of jumps to any time of a segment, 4 segments and then 2.",
    steps=_STEPS,
    followed=_FOLLOWED,
    against="default",
    experiments=(
        OURS,
        _changed(DEFAULT, "jumps4", "the first stage alone", {}, ("segments4",)),
        _changed(DEFAULT, "jumps2", "the second stage alone", {}, ("segments2",)),
        _changed(
            DEFAULT,
            "jumps_x0",
            "loss as x0, weighted by min(SNR + 1, 5)",
            {f"segments{count}__settings__loss_space": "x0" for count in (4, 2)},
        ),
        _changed(
            DEFAULT,
            "average",
            "average of the second stage's updates, decay 0.98",
            {"segments2__ema_decay": 0.98},
        ),
        _changed(f"{DEFAULT}:preference", "liked", "then a stage that follows the scorer", {}),
    ),
)
